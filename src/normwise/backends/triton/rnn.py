"""Recurrences by Triton's kernels: a matrix product and one kernel a step, forward and backward.

The input projection of all steps and the gradients of x and of both matrices are one product each, outside the loop.
All is float32, or x, the states and the two matrices are bfloat16 or float16 (or float64), and gains and biases of the
same dtype or float32. Products are torch's, in the dtype of x and as torch.backends says; everything else is computed
in float32.

Nothing here waits for the device, so that a call can be captured as a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normwise.backends.protocol import (
    LayerKernel,
    LayerRequest,
    LayerResult,
    Layout,
    RecurrenceRequest,
    accumulation_dtype,
)
from normwise.backends.recurrence import Recurrence, Weights
from normwise.backends.triton import runtime

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# A program keeps a whole row in registers.
MAX_UNITS = 8192

# Rows of a sample's sums, for G gates: G of the gradient of the summed input, which is that of the biases outside the
# norms; G of the gain on the hidden term or the sum; G of the gain on the input term, or of the bias inside the norm
# over the sum; and one each of a GRU's hidden bias of the candidate, of the cell norm's gain and of its bias.
SUMS = {gates: 3 * gates + 3 for gates in (1, 3, 4)}


@dataclass(frozen=True)
class Launch:
    """How a kernel is launched: elements of a row with those that are masked, and warps a program."""

    block: int
    warps: int


@cache
def launch_of(units: int) -> Launch:
    """For rows of so many units. Never by the batch, or each size of batch would be compiled for."""
    block = max(16, 1 << (units - 1).bit_length())
    return Launch(block, min(max(block // 128, 1), 16))


def supports(request: RecurrenceRequest) -> str | None:
    """What the kernels cannot do; that Triton is not installed is the last reason to be named."""
    config, x = request.config, request.x
    if config.norm == "batch":
        return "the Triton kernels take no batch statistics inside a recurrence"
    if config.zoneout:
        return "the Triton kernels take no zoneout"
    if request.layout.lengths is not None:
        return "the Triton kernels take the steps of each sequence, and must know how many they are"
    dtype = request.autocast or x.dtype
    for weights in request.weights:
        if weights.weight_hr is not None:
            return "the Triton kernels take no projection"
        if 0 in (weights.weight_ih.shape[-1], weights.weight_hh.shape[-1]):
            return "the Triton kernels have at least one input and one unit"
        if weights.weight_hh.shape[-1] > MAX_UNITS:
            return f"the Triton kernels take at most {MAX_UNITS} units, not {weights.weight_hh.shape[-1]}"
        if not _known_dtypes(dtype, weights, request.autocast is not None):
            dtypes = sorted({str(dtype), *(str(w.dtype) for w in weights if w is not None)})
            return (
                "the recurrent Triton kernels take x and matrices of one dtype, float32, bfloat16, float16 or float64, "
                f"and gains and biases of that dtype or float32, not {', '.join(dtypes)}"
            )
    return runtime.obstacle(x)


def _known_dtypes(dtype: torch.dtype, weights: Weights, autocast: bool) -> bool:
    vectors = (dtype, torch.float32)
    if dtype not in DTYPES or any(w is not None and w.dtype not in vectors for w in weights[2:]):
        return False
    return autocast or weights.weight_ih.dtype == weights.weight_hh.dtype == dtype


def forward(request: LayerRequest, needs_grad: bool) -> LayerResult:
    """All steps; keeps what `backward` needs if `needs_grad`: p, q, and h and c before each step."""
    from normwise.backends.triton.kernels import recurrent as kernels

    at = _Readable.of(request)
    config, x, units, batch, wide = request.config, at.x, at.units, request.layout.batch, at.wide
    steps = list(_steps(request.layout, request.reverse))
    p = x @ at.weights.weight_ih.t()
    # Without a gradient only the states before this step and the next one.
    states = len(x) if needs_grad else 2 * batch
    q = torch.empty_like(p) if needs_grad else p.new_empty((states, p.shape[1]))
    h = x.new_empty((states, units))
    c = x.new_empty((states, units), dtype=wide) if config.cell == "lstm" else None
    blended = x.new_empty((2 * batch, units), dtype=wide) if config.cell == "gru" else None
    output = x.new_empty((len(x), units))
    final_h, final_c = at.h0.clone(), None if at.c0 is None else at.c0.clone()
    # Where what is kept of each step's states begins, and of the wide ones of a GRU.
    place = [step.row if needs_grad else t % 2 * batch for t, step in enumerate(steps)] + [0]
    if steps:
        at.start(steps[0], at.h0, h[place[0] :])
        if c is not None and at.c0 is not None:
            at.start(steps[0], at.c0, c[place[0] :])
        if blended is not None:
            at.start(steps[0], at.h0, blended)
    hidden = at.weights.weight_hh.t()
    parameters, settings = at.parameters, _settings(config, units, wide)
    reset = None if at.reset is None else at.reset.view(torch.uint8)
    with runtime.on_device_of(x):
        for t, step in enumerate(steps):
            state, n = place[t], step.samples
            if not n:
                continue
            following = steps[t + 1] if t + 1 < len(steps) else _Step(0, 0)
            torch.mm(h[state : state + n], hidden, out=q[state : state + n])
            kernels.step_forward[(n,)](
                p,
                q,
                h,
                blended,
                c,
                output,
                final_h,
                final_c,
                reset,
                *parameters,
                step.row,
                following.row,
                state,
                place[t + 1],
                t % 2 * batch,
                (t + 1) % 2 * batch,
                following.samples,
                **settings,
            )
    saved = (p, q, h, c) if needs_grad else ()
    output = _flipped(output.view(*request.x.shape[:-1], units), at.flip)
    return LayerResult(output, final_h, final_c, {}, saved)


def backward(
    request: LayerRequest,
    saved: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of x, h0, c0 and the weights from those of the output, h and c, of which None stands for zeros."""
    from normwise.backends.triton.kernels import recurrent as kernels

    at = _Readable.of(request)
    config, x, units, batch, wide, w = request.config, at.x, at.units, request.layout.batch, at.wide, at.weights
    p, q, h, c = _saved(config, at, saved)
    steps = list(_steps(request.layout, request.reverse))
    doutput, dh_given, dc_given = grads
    if doutput is not None:
        _expect("doutput", doutput, (*request.x.shape[:-1], units), request.x, DTYPES)
        doutput = _flipped(doutput, at.flip).reshape(-1, units).contiguous()
    dh = _wide_copy("dh", dh_given, at.h0, wide)
    dc = None if at.c0 is None else _wide_copy("dc", dc_given, at.c0, wide)
    product = x.new_empty((batch, units))
    direct = dh.new_empty((batch, units)) if config.cell == "gru" else None
    dq = torch.empty_like(p)
    # One gradient does for both terms unless one has a norm or, as the candidate of torch's GRU, a gate of its own.
    shared = w.gain_hh is None and w.gain_ih is None and not (config.cell == "gru" and config.reset_after)
    dp = dq if shared else torch.empty_like(p)
    sums = dh.new_zeros((batch, SUMS[config.gates], units))
    parameters, settings = at.parameters, _settings(config, units, wide)
    following = _Step(0, 0)
    reset = None if at.reset is None else at.reset.view(torch.uint8)
    with runtime.on_device_of(x):
        for step in reversed(steps):
            n = step.samples
            if not n:
                continue
            kernels.step_backward[(n,)](
                p,
                q,
                h,
                c,
                doutput,
                dh,
                product,
                direct,
                dc,
                reset,
                *parameters,
                None if shared else dp,
                dq,
                sums,
                step.row,
                following.row,
                following.samples,
                **settings,
            )
            torch.mm(dq[step.row : step.row + n], w.weight_hh, out=product[:n])
            following = step
    if n := following.samples:  # the first step's
        starts = None if at.reset is None else at.reset[following.row : following.row + n, None]
        first = product[:n].to(wide) if direct is None else product[:n] + direct[:n]
        dh[:n] = first if starts is None else first.masked_fill(starts, 0)
        if dc is not None and starts is not None:
            dc[:n].masked_fill_(starts, 0)
    dx = None
    if needs[0]:
        dx = _flipped((dp @ w.weight_ih).view(request.x.shape), at.flip)
    of_weights: dict[str, Tensor] = {}
    if any(needs[3:]):
        of_weights = _of_vectors(config, sums.sum(0))
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


class _Step(NamedTuple):
    """A step in the order of processing: its first row, and its samples, the first ones."""

    row: int
    samples: int


def _steps(layout: Layout, reverse: bool) -> Iterator[_Step]:
    if layout.batch_sizes is None:
        order = range(layout.steps - 1, -1, -1) if reverse else range(layout.steps)
        yield from (_Step(t * layout.batch, layout.batch) for t in order)
        return
    row = 0
    for samples in layout.batch_sizes.tolist():
        yield _Step(row, samples)
        row += samples


class _Readable(NamedTuple):
    """The tensors of a request as the kernels read them: contiguous, rows in the order of processing in which dense
    ones run backwards by themselves."""

    x: Tensor  # (rows, inputs)
    h0: Tensor
    c0: Tensor | None
    weights: Weights
    reset: Tensor | None
    flip: Tensor | None
    units: int
    wide: torch.dtype

    @staticmethod
    def of(request: LayerRequest) -> _Readable:
        """Raises ValueError where a tensor is not of the shape that the kernels will read."""
        config, x, h0, c0, w, layout, reverse, reset, *_ = request
        units, inputs, batch = w.weight_hh.shape[1], x.shape[-1], layout.batch
        shape: tuple[int, ...] = (layout.steps, batch)
        flip = None
        if layout.batch_sizes is not None:
            _expect_falling(layout)
            shape = (sum(layout.batch_sizes.tolist()),)
            flip = layout.flip if reverse else None
            if reverse and flip is None:
                raise ValueError("flip: missing; packed rows run backwards by it")
            if flip is not None:
                _expect("flip", flip, shape, x, (torch.int64,))
        _expect("x", x, (*shape, inputs), x, DTYPES)
        if reset is not None:
            _expect("reset", reset, shape, x, (torch.bool,))
            reset = _flipped(reset, flip).reshape(-1).contiguous()
        for name, expected in config.shapes(inputs, units).items():
            t = getattr(w, name)
            if t is None and not name.startswith("bias"):
                raise ValueError(f"{name}: missing")
            if t is not None:
                _expect(name, t, expected, x, (x.dtype,) if name.startswith("weight") else (x.dtype, torch.float32))
        if (c0 is None) == (config.cell == "lstm"):
            raise ValueError("an LSTM, and it alone, has a cell state c0")
        for name, state in (("h0", h0), ("c0", c0)):
            if state is not None:
                _expect(name, state, (batch, units), x, (x.dtype,))
        return _Readable(
            _flipped(x, flip).reshape(-1, inputs).contiguous(),
            h0.contiguous(),
            None if c0 is None else c0.contiguous(),
            Weights(*(None if t is None else t.contiguous() for t in w)),  # type: ignore[arg-type]
            reset,
            flip,
            units,
            accumulation_dtype(x.dtype),
        )

    def start(self, step: _Step, state: Tensor, rows: Tensor) -> None:
        """Write the initial `state` where the first step reads it."""
        rows, state = rows[: step.samples], state[: step.samples]
        if self.reset is None:
            rows.copy_(state)
        else:
            rows.copy_(state.masked_fill(self.reset[step.row : step.row + step.samples, None], 0))

    @property
    def parameters(self) -> tuple[Tensor | None, ...]:
        """Biases and gains in the kernels' order."""
        w = self.weights
        return w.bias_ih, w.bias_hh, w.gain_ih, w.gain_hh, w.gain_sum, w.bias_inner, w.gain_c, w.bias_c


def _expect_falling(layout: Layout) -> None:
    sizes = [layout.batch, *layout.batch_sizes.tolist()]  # type: ignore[union-attr]
    if len(sizes) != layout.steps + 1 or sizes != sorted(sizes, reverse=True) or sizes[-1] < 0:
        raise ValueError(f"batch_sizes: expected {layout.steps} that fall from at most {layout.batch}, got {sizes[1:]}")


def _saved(
    config: Recurrence, at: _Readable, saved: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """What the forward kept, contiguous: hooks on saved tensors may have put others in its place."""
    rows, found = len(at.x), []
    gates = config.gates * at.units
    expected = {"p": (gates, at.x.dtype), "q": (gates, at.x.dtype), "h": (at.units, at.x.dtype)}
    if config.cell == "lstm":
        expected["c"] = (at.units, at.wide)
    for (name, (width, dtype)), t in zip(expected.items(), saved, strict=False):
        if t is None:
            raise ValueError(f"{name}: missing; the forward keeps it with needs_grad=True")
        _expect(name, t, (rows, width), at.x, (dtype,))
        found.append(t.contiguous())
    if len(found) < len(expected):
        raise ValueError("the forward keeps what the backward needs with needs_grad=True")
    p, q, h, *c = found
    return p, q, h, c[0] if c else None


def _expect(name: str, t: Tensor, shape: tuple[int, ...], beside: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if t.shape != shape or t.dtype not in dtypes or t.device != beside.device:
        found = f"{tuple(t.shape)} of {t.dtype} on {t.device}"
        accepted = " or ".join(map(str, dict.fromkeys(dtypes)))
        raise ValueError(f"{name}: expected {tuple(shape)} of {accepted} on {beside.device}, but got {found}")


def _flipped(rows: Tensor, flip: Tensor | None) -> Tensor:
    return rows if flip is None else rows.index_select(0, flip)


def _wide_copy(name: str, grad: Tensor | None, state: Tensor, wide: torch.dtype) -> Tensor:
    """A copy, or zeros, since the result is written over it."""
    if grad is None:
        return torch.zeros_like(state, dtype=wide)
    _expect(name, grad, tuple(state.shape), state, DTYPES)
    return torch.empty_like(state, dtype=wide).copy_(grad)


@cache
def _settings(config: Recurrence, units: int, wide: torch.dtype) -> dict[str, Any]:
    """The kernels' constants and launch settings."""
    import triton.language as tl

    sizes = config.groups or (config.gates,)
    members = [(group, size) for group, size in enumerate(sizes) for _ in range(size)]
    members += [(3, 1)] * (4 - len(members))
    return {
        "CELL": f"rnn_{config.nonlinearity}" if config.cell == "rnn" else config.cell,
        "GATES": config.gates,
        "GROUPS": sum(group << 2 * gate for gate, (group, _) in enumerate(members)),
        "COUNTS": sum(size << 3 * gate for gate, (_, size) in enumerate(members)),
        "EPS": config.eps,
        "CENTER": config.norm == "layer",
        "CELL_NORM": config.cell_norm,
        "RESET_AFTER": config.reset_after,
        "PAPER_GATE": config.update_gate == "paper",
        "UPDATE_OFFSET": config.update_offset,
        "WIDE": tl.float64 if wide is torch.float64 else tl.float32,
        "UNITS": units,
        "BLOCK": launch_of(units).block,
        "num_warps": launch_of(units).warps,
    }


KERNELS = {"layer": LayerKernel(forward, backward)}
