"""All steps in one launch, forward and backward: a program takes some samples and keeps W_hh on chip. For few units."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normwise.backends.triton import memory, runtime, settings
from normwise.backends.triton.rnn.requests import SUMS, Readable, constants
from normwise.backends.triton.runtime import blocks, power_of_2


def obstacle(at: Readable) -> str | None:
    """What keeps this design from a call, or None."""
    most = dict(settings.recurrent().persistent_units)[at.x.dtype.itemsize]
    if at.units > most:
        return f"a program keeps W_hh of at most {most} units in {at.x.dtype} on chip, not of {at.units}"
    return obstacle_of_table(at)


def obstacle_of_table(at: Readable) -> str | None:
    """What keeps `rows_of_steps` from a call, or None."""
    if at.layout.batch_sizes is not None and at.x.is_cuda and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph would keep the address of the host's table of steps"
    return None


def precision(at: Readable) -> str:
    """How float32 is multiplied, as cuDNN's recurrent layers are told to."""
    return "tf32" if torch.backends.cudnn.allow_tf32 else "tf32x3"


def constants_of(at: Readable) -> dict[str, Any]:
    """The kernels' constants and launch settings."""
    import triton.language as tl

    block = max(16, power_of_2(at.units))
    operand = getattr(tl, str(at.x.dtype).removeprefix("torch."))
    return {
        **constants(at.config, at.units, at.wide),
        # Triton's interpreter multiplies bfloat16 as the integers of its bits.
        "OPERAND": memory.wide(at.x.dtype) if runtime.interpreted() else operand,
        "PRECISION": precision(at),
        "SAMPLES": settings.recurrent().samples,
        "BLOCK": block,
        "num_warps": 8 if block == 128 else 4,
        "num_stages": 2,  # the backward's loads of a step during the one before it; more would not fit beside W_hh
    }


def rows_of_steps(at: Readable, samples: int) -> tuple[Tensor | None, tuple[int, int, int, int]]:
    """The kernels' `table`, for programs of so many samples, and (steps, batch, first_row, row_step)."""
    layout, batch = at.layout, at.batch
    if layout.batch_sizes is None:
        first, step = ((layout.steps - 1) * batch, -batch) if at.reverse else (0, batch)
        return None, (layout.steps, batch, first, step)
    sizes: list[int] = layout.batch_sizes.tolist()
    table = [0]
    for size in sizes:
        table.append(table[-1] + size)
    table += [sum(size > first for size in sizes) for first in range(0, batch, samples)]
    return torch.tensor(table).to(at.x.device, non_blocking=True), (layout.steps, batch, 0, 0)


def outputs_of(at: Readable, p: Tensor, needs_grad: bool) -> tuple[Any, ...]:
    """For q, h and c before each step (None where they are not kept), the output and the final h and c."""
    output, final_h = at.x.new_empty((len(at.x), at.units)), torch.empty_like(at.h0)
    final_c = None if at.c0 is None else torch.empty_like(at.c0)
    q = h = c = None
    if needs_grad:
        q, h = torch.empty_like(p), torch.empty_like(output)
        c = None if at.c0 is None else torch.empty_like(output, dtype=at.wide)
    return q, h, c, output, final_h, final_c


def forward(
    at: Readable, p: Tensor, needs_grad: bool
) -> tuple[Tensor, Tensor, Tensor | None, tuple[Tensor | None, ...]]:
    """Output rows, the final states, and with `needs_grad` what `requests.kept` lists."""
    from normwise.backends.triton.kernels import persistent as kernels

    options = constants_of(at)
    q, h, c, output, final_h, final_c = outputs_of(at, p, needs_grad)
    if at.batch:
        table, sizes = rows_of_steps(at, options["SAMPLES"])
        kernels.sequence_forward[(blocks(at.batch, options["SAMPLES"]),)](
            p,
            q,
            h,
            c,
            output,
            at.h0,
            at.c0,
            final_h,
            final_c,
            at.resets,
            table,
            at.weights.weight_hh,
            *at.parameters,
            *sizes,
            **options,
        )
    return output, final_h, final_c, (p, q, h, c) if needs_grad else ()


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
    from normwise.backends.triton.kernels import persistent as kernels

    options = constants_of(at)
    d, dq, dshown = gradients_of(at, p)
    if at.batch:
        table, sizes = rows_of_steps(at, options["SAMPLES"])
        kernels.sequence_backward[(blocks(at.batch, options["SAMPLES"]),)](
            p,
            q,
            h,
            c,
            doutput,
            dh,
            dc,
            at.resets,
            table,
            at.weights.weight_hh,
            *at.parameters,
            d,
            dq,
            dshown,
            *sizes,
            **options,
        )
    return of_rows(at, p, q, c, d, dq, dshown)


def gradients_of(at: Readable, p: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """For the gradients of the input term (where `of_rows` needs them), of q and of what an LSTM's cell norm shows."""
    needs_rows = not at.shares_gradient or any(t is not None for t in at.parameters)
    d = torch.empty_like(p, dtype=at.wide) if needs_rows else None
    dshown = None if at.weights.gain_c is None else at.x.new_empty((len(at.x), at.units), dtype=at.wide)
    return d, torch.empty_like(p), dshown


def of_rows(
    at: Readable, p: Tensor, q: Tensor, c: Tensor | None, d: Tensor | None, dq: Tensor, dshown: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of p and q, and sums (see `SUMS`), once all steps are done."""
    from normwise.backends.triton.kernels import persistent as kernels

    rows, dp = len(at.x), dq if at.shares_gradient else torch.empty_like(p)
    programs = min(rows, settings.recurrent().row_programs)
    sums = dq.new_zeros((programs, SUMS[at.config.gates], at.units), dtype=at.wide)
    if programs and d is not None:
        block = max(16, power_of_2(at.units))
        kernels.rows_of_sequence_backward[(programs,)](
            p,
            q,
            c,
            *at.parameters,
            d,
            dq,
            dshown,
            None if at.shares_gradient else dp,
            sums,
            rows,
            **constants(at.config, at.units, at.wide),
            BLOCK=block,
            num_warps=max(block // 128, 1),
        )
    return dp, dq, sums
