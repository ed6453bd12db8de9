"""All steps forward in one launch whose programs wait for one another, with W_hh spread over them."""

from __future__ import annotations

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


def forward(
    at: Readable, p: Tensor, needs_grad: bool
) -> tuple[Tensor, Tensor, Tensor | None, tuple[Tensor | None, ...]]:
    """Output rows, the final states, and with `needs_grad` what `requests.kept` lists."""
    from normwise.backends.triton.kernels import grid as kernels

    x, w, (tiles, programs) = at.x, at.weights, grid_of(at)
    q, h, c, output, final_h, final_c = persistent.outputs_of(at, p, needs_grad)
    if at.batch:
        options = persistent.constants_of(at)
        table, sizes = persistent.rows_of_steps(at, options["SAMPLES"])
        statistics = None
        if w.gain_ih is not None:
            statistics = x.new_empty((len(x), 8), dtype=at.wide)
            if len(x):
                named = constants(at.config, at.units, at.wide)
                names = ("UNITS", "GATES", "GROUPS", "COUNTS", "EPS", "CENTER", "WIDE")
                kernels.input_statistics[(len(x),)](
                    p,
                    statistics,
                    **{name: named[name] for name in names},
                    BLOCK=options["BLOCK"],
                    num_warps=max(options["BLOCK"] // 128, 1),
                )
        block = min(options["BLOCK"], most_units(at) // 2)
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
            statistics,
            torch.zeros((tiles, 32), dtype=torch.int32, device=x.device),
            x.new_empty((4 * at.batch, 8, programs), dtype=at.wide),
            x.new_empty((4 * at.batch, at.units), dtype=exchanged),
            *sizes,
            **options
            | {
                "BLOCK": block,
                "SHARE": settings.recurrent().share,
                "PROGRAMS": programs,
                "BLOCK_PROGRAMS": power_of_2(programs),
                "num_warps": 8 if block < at.units else 4,
                # A load that is moved into the step before, as more stages would, would be moved before the meeting.
                "num_stages": 1,
                "launch_cooperative_grid": True,
            },
        )
    return output, final_h, final_c, (p, q, h, c) if needs_grad else ()
