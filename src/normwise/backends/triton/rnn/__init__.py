"""Recurrences by Triton's kernels.

The input projection of all steps and the gradients of x and of both matrices are one product each, outside the loop
over steps. Nothing here waits for the device, so that a call can be captured as a CUDA graph.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from normwise.backends.protocol import LayerRequest, LayerResult
from normwise.backends.recurrence import Recurrence, Weights
from normwise.backends.triton import runtime, settings
from normwise.backends.triton.rnn import grid, persistent, stepwise
from normwise.backends.triton.rnn.requests import DTYPES, Readable, expect, flipped, kept, saves, supports, wide_copy

__all__ = ["DTYPES", "backward", "forward", "saves", "supports"]


class Design(NamedTuple):
    """A way to compute all steps. `obstacle`: why it does not take a call, or None. All keep the same tensors, so that
    any design's backward follows any other's forward."""

    obstacle: Callable[[Readable], str | None]
    forward: Callable[..., Any]
    backward: Callable[..., Any]


DESIGNS = {
    "grid": Design(grid.obstacle, grid.forward, grid.backward),
    "persistent": Design(persistent.obstacle, persistent.forward, persistent.backward),
    "stepwise": Design(stepwise.obstacle, stepwise.forward, stepwise.backward),
}


def chosen(at: Readable) -> tuple[str, dict[str, str]]:
    """The design that computes a call, forward and backward, and why those before it in `settings.Recurrent.designs` do
    not."""
    refused: dict[str, str] = {}
    for name in settings.recurrent().designs:
        reason = DESIGNS[name].obstacle(at)
        if reason is None:
            return name, refused
        refused[name] = reason
    return "stepwise", refused


def computed(at: Readable, direction: Literal["forward", "backward"], *args: Any) -> Any:
    """What the chosen design gives."""
    name, _ = chosen(at)
    with runtime.on_device_of(at.x):
        return getattr(DESIGNS[name], direction)(at, *args)


def forward(request: LayerRequest, needs_grad: bool) -> LayerResult:
    """All steps; keeps `requests.SAVED` if `needs_grad`."""
    at = Readable.of(request)
    p = at.x @ at.weights.weight_ih.t()
    output, h, c, saved = computed(at, "forward", p, needs_grad)
    return LayerResult(flipped(output.view(*request.x.shape[:-1], at.units), at.flip), h, c, {}, saved)


def backward(
    request: LayerRequest,
    saved: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of x, h0, c0 and the weights from those of the output, h and c, of which None stands for zeros."""
    at = Readable.of(request)
    x, w, units = at.x, at.weights, at.units
    p, q, h, c = kept(at, saved)
    doutput, dh_given, dc_given = grads
    if doutput is not None:
        expect("doutput", doutput, (*request.x.shape[:-1], units), request.x, DTYPES)
        doutput = flipped(doutput, at.flip).reshape(-1, units).contiguous()
    dh = wide_copy("dh", dh_given, at.h0, at.wide)
    dc = None if at.c0 is None else wide_copy("dc", dc_given, at.c0, at.wide)
    dp, dq, sums = computed(at, "backward", p, q, h, c, doutput, dh, dc)
    dx = flipped((dp @ w.weight_ih).view(request.x.shape), at.flip) if needs[0] else None
    of_weights: dict[str, Tensor] = {}
    if any(needs[3:]):
        of_weights = _of_vectors(at.config, sums.sum(0))
        of_weights["weight_ih"], of_weights["weight_hh"] = dp.t() @ x, dq.t() @ h
    named = zip(Weights._fields, request.weights, strict=True)
    found = [None if t is None or name not in of_weights else of_weights[name].to(t.dtype) for name, t in named]
    return [dx, dh.to(at.h0.dtype), None if dc is None else dc.to(at.h0.dtype), *found]


def _of_vectors(config: Recurrence, sums: Tensor) -> dict[str, Tensor]:
    """The gradients of gains and biases from `SUMS`, those of a recurrence without one included."""
    gates = config.gates
    bias, of_hidden, of_input = (part.flatten() for part in sums[: 3 * gates].split(gates))
    hidden_bias = bias
    if config.cell == "gru" and config.reset_after:
        hidden_bias = torch.cat([sums[: gates - 1].flatten(), sums[3 * gates]])
    return {
        "bias_ih": bias,
        "bias_hh": hidden_bias,
        "gain_ih": of_input,
        "gain_hh": of_hidden,
        "gain_sum": of_hidden,
        "bias_inner": of_input,
        "gain_c": sums[3 * gates + 1],
        "bias_c": sums[3 * gates + 2],
    }
