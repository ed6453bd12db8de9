"""A matrix product and one kernel a step, forward and backward: for any number of units.

Products are torch's, in the dtype of x and as torch.backends says.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from normwise.backends.triton.rnn.requests import SUMS, Readable, Step, constants


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


def obstacle(at: Readable) -> str | None:
    """What keeps this design from a call: nothing."""
    return None


def _settings(at: Readable) -> dict[str, Any]:
    launch = launch_of(at.units)
    return {**constants(at.config, at.units, at.wide), "BLOCK": launch.block, "num_warps": launch.warps}


def forward(
    at: Readable, p: Tensor, needs_grad: bool
) -> tuple[Tensor, Tensor, Tensor | None, tuple[Tensor | None, ...]]:
    """Output rows, the final states, and with `needs_grad` what `requests.kept` lists."""
    from normwise.backends.triton.kernels import recurrent as kernels

    config, x, units, batch, wide, steps = at.config, at.x, at.units, at.batch, at.wide, at.steps
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
    parameters, settings, reset = at.parameters, _settings(at), at.resets
    for t, step in enumerate(steps):
        state, n = place[t], step.samples
        if not n:
            continue
        following = steps[t + 1] if t + 1 < len(steps) else Step(0, 0)
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
    return output, final_h, final_c, saved


def backward(
    at: Readable,
    p: Tensor,
    q: Tensor,
    h: Tensor,
    c: Tensor | None,
    doutput: Tensor | None,
    dh: Tensor,
    dc: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of p and q, and sums (see `SUMS`, and any number of rows); `dh` and `dc` become those of h0, c0."""
    from normwise.backends.triton.kernels import recurrent as kernels

    config, x, units, batch, wide, steps = at.config, at.x, at.units, at.batch, at.wide, at.steps
    product = x.new_empty((batch, units))
    direct = dh.new_empty((batch, units)) if config.cell == "gru" else None
    dq = torch.empty_like(p)
    shared = at.shares_gradient
    dp = dq if shared else torch.empty_like(p)
    sums = dh.new_zeros((batch, SUMS[config.gates], units))
    parameters, settings, reset = at.parameters, _settings(at), at.resets
    following = Step(0, 0)
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
        torch.mm(dq[step.row : step.row + n], at.weights.weight_hh, out=product[:n])
        following = step
    if n := following.samples:  # the first step's
        starts = None if at.reset is None else at.reset[following.row : following.row + n, None]
        first = product[:n].to(wide) if direct is None else product[:n] + direct[:n]
        dh[:n] = first if starts is None else first.masked_fill(starts, 0)
        if dc is not None and starts is not None:
            dc[:n].masked_fill_(starts, 0)
    return dp, dq, sums
