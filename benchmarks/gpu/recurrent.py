"""The table of recurrent layers: each design of the kernels, eager and replayed from a CUDA graph, against cuDNN's
layer without norm, the loop over steps, and a loop over a compiled cell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks.gpu.clock import Call, Device, products
from benchmarks.gpu.log import Log
from benchmarks.gpu.recurrent_cases import CELLS, DTYPES, MODES, SHAPES, Built, Case, CompiledCell, designs

BASELINE = "cuDNN, no norm"
# A compiled cell takes seconds to prepare, also where it was compiled before.
COMPILED_DTYPES = ("bfloat16",)
# Steps over which a compiled cell is compared with ours: differences in rounding grow from step to step.
COMPARED_STEPS = 5
COMPILED_ALLOWED = 0.1
DRY_SHAPE = (2, 2, 3, 5)


class Timed(NamedTuple):
    case: Case
    mode: str

    @property
    def name(self) -> str:
        return f"{self.case.name} {self.mode}"


def timed(dry: bool) -> list[Timed]:
    if dry:
        three = zip(CELLS, ("bfloat16", "float16", "tf32"), (MODES[0], MODES[1], MODES[0]), strict=True)
        return [Timed(Case(cell, DRY_SHAPE, dtype), mode) for cell, dtype, mode in three]
    return [
        Timed(Case(cell, shape, dtype), mode)
        for dtype in DTYPES
        for cell in CELLS
        for shape in SHAPES
        for mode in MODES
    ]


def ways(built: Built, mode: str, device: Device) -> dict[str, Callable[[], Call]]:
    """For each way, what makes the call. Their order is that in which they take turns."""
    case, layer, dtype = built.case, built.layer, built.x.dtype

    def cudnn() -> Call:
        plain = getattr(nn, case.cell)(*case.shape[2:], device=device.type, dtype=dtype)
        return built.call(mode, plain)  # type: ignore[no-any-return]

    def ours(design: str, replayed: bool = False) -> Callable[[], Call]:
        def make() -> Call:
            call: Call = built.call(mode, layer, "triton", designs()[design])
            return device.replayed(call) if replayed else call

        return make

    found: dict[str, Callable[[], Call]] = {BASELINE: cudnn}
    for design in designs():
        found[design] = ours(design)
        found[f"{design}, replayed"] = ours(design, replayed=True)
    found["loop"] = lambda: built.call(mode, layer, "aten")  # type: ignore[no-any-return]
    if case.dtype in COMPILED_DTYPES:
        found["compiled cell"] = lambda: _compiled(built, mode, device)
    return found


def _compiled(built: Built, mode: str, device: Device) -> Call:
    cell = CompiledCell(built.layer, built.case.cell, "eager" if device.dry else "inductor")
    call: Call = built.call(mode, cell)
    result = call()
    theirs = result[0] if isinstance(result, list) else result
    ours = built.call(MODES[1], built.layer, "aten")()
    apart = float((theirs - ours)[:COMPARED_STEPS].detach().abs().max())
    if not apart <= COMPILED_ALLOWED:
        raise RuntimeError(f"the compiled cell is not the same layer: results are {apart:.1e} apart")
    return call


def measured(one: Timed, device: Device, seconds: float) -> dict[str, Any]:
    with products(one.case.dtype) as dtype:
        built = Built(one.case, device.type, dtype)
        calls: dict[str, Call] = {}
        refused: dict[str, str] = {}
        for name, make in ways(built, one.mode, device).items():
            device.keep(name, make, calls, refused)
        times = device.times(calls, min(seconds, 3.0), {name: BASELINE for name in calls if name != BASELINE})
        return {
            "ways": times,
            "refused": refused,
            "launches": {name: _of_a_step(one, name, device, dtype) for name in calls if name in designs()},
            **one.case._asdict(),
            "mode": one.mode,
        }


def _of_a_step(one: Timed, name: str, device: Device, dtype: torch.dtype) -> float | None:
    """Launches of one step more, by the difference between a call of two steps and one of six."""
    counts = []
    for steps in (2, 6):
        some = Built(one.case._replace(shape=(steps, *one.case.shape[1:])), device.type, dtype)
        counts.append(device.launches(ways(some, one.mode, device)[name]()))
    few, more = counts
    return None if few is None or more is None else (more - few) / 4


def run(device: Device, log: Log) -> None:
    torch.manual_seed(0)
    log.each(timed(device.dry), lambda one: one.name, lambda one, s: measured(one, device, s), say)


def say(figure: dict[str, Any]) -> str:
    steps = figure["shape"][0]
    shown = [
        f"{name} {'dry' if found['median'] is None else format(found['median'] * 1e6 / steps, '.2f')}"
        for name, found in figure["ways"].items()
    ]
    return "us a step: " + "  ".join([*shown, *(f"{name}: {why}" for name, why in figure["refused"].items())])
