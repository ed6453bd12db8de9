"""The table of norms: normwise's Triton kernels and its default, against ATen, Inductor and a copy of the same bytes;
eager, where launches count, and replayed from a CUDA graph, where they do not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch

import normwise
from benchmarks.gpu.clock import Call, Device, products
from benchmarks.gpu.log import Log
from benchmarks.gpu.norm_cases import ALLOWED, DTYPES, Built, NormCase, cases, error_of

MODES = ("forward", "forward+backward")
BASELINE = "ATen"
REPLAYED = ", replayed"


class Timed(NamedTuple):
    """A case in a dtype, as it is timed."""

    case: NormCase
    dtype: str
    mode: str

    @property
    def name(self) -> str:
        return f"{self.case.name} {self.dtype} {self.mode}"


def timed(dry: bool) -> list[Timed]:
    """The first dtype of all cases before the second of any. Dry: a case of each family, in its small shape."""
    every = cases()
    if dry:
        kinds = (
            "masked BatchNorm",
            "GroupNorm + SiLU",
            "RMSNorm",
            "LayerNorm, scale and shift by sample",
            "gate + RMSNorm",
        )
        few = [next(c for c in every if c.kind == kind) for kind in kinds]
        return [Timed(replace(c, shape=c.small), "float32", MODES[1]) for c in few]
    # Of the forward alone bfloat16 is enough: Inductor takes seconds to prepare each.
    return [
        Timed(case, dtype, mode)
        for dtype in DTYPES
        for mode in (MODES if dtype == DTYPES[0] else MODES[1:])
        for case in every
        if dtype in case.dtypes
    ]


def ways(built: Built, mode: str, device: Device) -> dict[str, Call]:
    """Eager ones. Their order is that in which they take turns."""
    case = built.case
    run: Callable[[Any], object] = built.inference if mode == MODES[0] else built.step

    def forced(backend: str | None) -> Call:
        def call() -> object:
            with normwise.backend(backend):
                return run(case.ours)

        return call

    torch.compiler.reset()  # else it gives up after a few shapes, or makes them variable
    compiled = torch.compile(case.theirs, dynamic=False, backend="eager" if device.dry else "inductor")
    return {
        BASELINE: lambda: run(case.theirs),
        "Triton": forced("triton"),
        "default": forced(None),
        "Inductor": lambda: run(compiled),
        "copy": _copy(built, case.moved[MODES.index(mode)]),
    }


def _copy(built: Built, tensors: int) -> Call:
    """Reads half of what must be moved, and writes as much."""
    elements = built.inputs[0].numel() * tensors // 2
    source = torch.ones(elements, dtype=built.dtype, device=built.inputs[0].device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def measured(one: Timed, device: Device, seconds: float) -> dict[str, Any]:
    with products(one.dtype) as dtype:
        built = Built(one.case, device.type, dtype, small=False)
        with normwise.backend("triton"):
            error = error_of(built.step(one.case.ours), built.truth(device.type), ALLOWED[dtype])
        if not error <= 1:
            return {"error": error, "failed": f"wrong: {error:.1f} times the allowed error; nothing else is said of it"}
        eager = ways(built, one.mode, device)
        every: dict[str, Call] = {}
        refused: dict[str, str] = {}
        for name, call in eager.items():
            device.keep(name, lambda call=call: call, every, refused)
            if name in every and name != "default":  # which, replayed, is one of the others
                device.keep(name + REPLAYED, lambda call=call: device.replayed(call), every, refused)
        # What is replayed is held against ATen's replayed.
        against = {name: BASELINE + name[len(name.removesuffix(REPLAYED)) :] for name in every}
        times = device.times(every, min(seconds, 2.0), {a: b for a, b in against.items() if a != b})
        counted = {name: device.launches(call) for name, call in eager.items() if name in every and name != "copy"}
        about = {"norm": one.case.name, "dtype": one.dtype, "mode": one.mode}
        return {"error": error, "ways": times, "refused": refused, "launches": counted, **about}


def run(device: Device, log: Log) -> None:
    torch.manual_seed(0)
    log.each(timed(device.dry), lambda one: one.name, lambda one, s: measured(one, device, s), say)


def say(figure: dict[str, Any]) -> str:
    shown = [f"{name} {_us(found['median'])}" for name, found in figure["ways"].items()]
    return "  ".join([*shown, *(f"{name} refused: {why}" for name, why in figure["refused"].items())])


def _us(seconds: float | None) -> str:
    return "dry" if seconds is None else f"{seconds * 1e6:.1f}"
