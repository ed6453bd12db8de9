"""All steps in one launch whose programs wait for one another, forward and backward, with W_hh spread over them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from normwise.backends.triton import settings
from normwise.backends.triton.rnn import persistent
from normwise.backends.triton.rnn.requests import Readable, constants
from normwise.backends.triton.runtime import blocks, power_of_2


def grid_of(at: Readable) -> tuple[int, int]:
    """Tiles of samples, and programs of each."""
    options = settings.recurrent()
    return blocks(at.batch, options.samples), blocks(at.units, options.share)


def most_units(at: Readable) -> int:
    return dict(settings.recurrent().grid_units)[at.x.dtype.itemsize]


def resident(x: Tensor) -> int:
    """Programs that surely run at once: one a multiprocessor. (The launch asks the driver, too.)"""
    if x.is_cuda:
        return int(torch.cuda.get_device_properties(x.device).multi_processor_count)
    return settings.recurrent().multiprocessors


def obstacle(at: Readable) -> str | None:
    """What keeps this design from a call, or None."""
    (tiles, programs), most = grid_of(at), most_units(at)
    if at.units > most:
        return f"programs share W_hh of at most {most} units in {at.x.dtype}, not of {at.units}"
    if tiles * programs > resident(at.x):
        return f"{tiles * programs} programs wait for one another, but {resident(at.x)} surely run at once"
    return persistent.obstacle_of_table(at)


def constants_of(at: Readable) -> dict[str, Any]:
    """The kernels' constants and launch settings."""
    (_, programs), options = grid_of(at), persistent.constants_of(at)
    block = min(options["BLOCK"], most_units(at) // 2)
    return options | {
        "BLOCK": block,
        "SHARE": settings.recurrent().share,
        "PROGRAMS": programs,
        "BLOCK_PROGRAMS": power_of_2(programs),
        "num_warps": 8 if block < at.units else 4,
        # A load that is moved into the step before, as more stages would, would be moved before the meeting.
        "num_stages": 1,
        "launch_cooperative_grid": True,
    }


def statistics_of(at: Readable, p: Tensor, parameters: Sequence[Tensor | None], q: Any, c: Any) -> Tensor | None:
    """Of the norms of all rows whose gains are among `parameters` (all but the last); None where none is."""
    from normwise.backends.triton.kernels import row_statistics as kernels

    _, _, gain_ih, gain_hh, gain_sum, _, gain_c = parameters
    if all(gain is None for gain in (gain_ih, gain_hh, gain_sum, gain_c)):
        return None
    rows, options = len(at.x), constants(at.config, at.units, at.wide)
    statistics = at.x.new_empty((rows, kernels.NUMBERS.value), dtype=at.wide)
    block = max(16, power_of_2(at.units))
    if rows:
        kernels.statistics_of_rows[(rows,)](
            p,
            q,
            c,
            *parameters,
            statistics,
            **{name: options[name] for name in ("UNITS", "GATES", "GROUPS", "COUNTS", "EPS", "CENTER", "WIDE")},
            BLOCK=block,
            num_warps=max(block // 128, 1),
        )
    return statistics


def forward(
    at: Readable, p: Tensor, needs_grad: bool
) -> tuple[Tensor, Tensor, Tensor | None, tuple[Tensor | None, ...]]:
    """Output rows, the final states, and with `needs_grad` what `requests.kept` lists."""
    from normwise.backends.triton.kernels import grid as kernels

    x, w, (tiles, programs) = at.x, at.weights, grid_of(at)
    q, h, c, output, final_h, final_c = persistent.outputs_of(at, p, needs_grad)
    if at.batch:
        options = constants_of(at)
        table, sizes = persistent.rows_of_steps(at, options["SAMPLES"])
        exchanged = at.wide if w.gain_c is not None else x.dtype
        kernels.grid_forward[(tiles, programs)](
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
            w.weight_hh,
            *at.parameters,
            statistics_of(at, p, (None, None, w.gain_ih, None, None, None, None), None, None),
            torch.zeros((tiles, 32), dtype=torch.int32, device=x.device),
            x.new_empty((4 * at.batch, 8, programs), dtype=at.wide),
            x.new_empty((4 * at.batch, at.units), dtype=exchanged),
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
    from normwise.backends.triton.kernels import exchange
    from normwise.backends.triton.kernels import grid_backward as kernels

    (tiles, programs), options = grid_of(at), constants_of(at)
    d, dq, dshown = persistent.gradients_of(at, p)
    if at.batch:
        table, sizes = persistent.rows_of_steps(at, options["SAMPLES"])
        kernels.grid_backward[(tiles, programs)](
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
            statistics_of(at, p, at.parameters[:-1], q, c),
            torch.zeros((tiles, 32), dtype=torch.int32, device=p.device),
            dh.new_empty((at.batch, exchange.NUMBERS.value, programs)),
            *sizes,
            **options,
        )
    return persistent.of_rows(at, p, q, c, d, dq, dshown)
