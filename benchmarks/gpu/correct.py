"""The proof, before anything is timed: outputs and all gradients of norms and recurrent layers by the Triton kernels
against the reference in float64 on the CPU, fresh memory full of NaN, and the same bits in every repetition."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

import normwise
from benchmarks.gpu import norm_cases, recurrent_cases
from benchmarks.gpu.clock import Device, poisoned_memory, products
from benchmarks.gpu.log import Log
from normwise.ops.dispatch import BackendError

REPEATS = 20


class Proof(NamedTuple):
    """Something to be proven, and the design of the kernels that it is about."""

    case: norm_cases.NormCase | recurrent_cases.Case
    dtype: str
    design: str = ""

    @property
    def name(self) -> str:
        if not self.design:
            return f"{replace(self.case, shape=self.case.small).name} {self.dtype}"  # type: ignore[arg-type]
        return f"{self.case.name} by {self.design}"


def proofs(dry: bool) -> list[Proof]:
    norms = [Proof(case, dtype) for dtype in norm_cases.DTYPES for case in norm_cases.cases()]
    rnns = [
        Proof(case, case.dtype, design) for design in recurrent_cases.designs() for case in recurrent_cases.proofs()
    ]
    if dry:
        # One case of each kind, and a recurrence with all options.
        of_kind = {case.kind: case for case in norm_cases.cases()}
        norms = [Proof(case, norm_cases.DTYPES[n % 3]) for n, case in enumerate(of_kind.values())]
        rnns = [
            Proof(recurrent_cases.Case(cell, (3, 3, 4, 9), dtype, ragged=True), dtype, design)
            for design in recurrent_cases.designs()
            for cell, dtype in zip(recurrent_cases.CELLS, ("float32", "bfloat16", "float32"), strict=True)
        ]
    return [*norms, *rnns]


def outcome(proof: Proof, device: Device) -> dict[str, Any]:
    """The largest error as a share of what is allowed, and in how many of the repetitions a bit was different."""
    with products(proof.dtype) as dtype:
        call, error = _prepared(proof, device, dtype)
        try:
            with poisoned_memory():
                found = call()
        except BackendError as refused:
            if not proof.design:
                raise
            return {"error": 0.0, "refused": str(refused)[:300]}
        figure: dict[str, Any] = {"error": error(found)}
        different = 0
        for _ in range(1 if device.dry else REPEATS):
            again = call()
            different += not all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
        if different:
            figure["failed"] = f"{different} of {REPEATS} repetitions gave other bits"
        return figure


def _prepared(
    proof: Proof, device: Device, dtype: torch.dtype
) -> tuple[Callable[[], Sequence[Tensor]], Callable[[Sequence[Tensor]], float]]:
    """The call of the kernels, and the error of what it gives."""
    case = proof.case
    if isinstance(case, norm_cases.NormCase):
        norm = norm_cases.Built(case, device.type, dtype, small=True)
        truth = norm.truth()
        allowed = norm_cases.ALLOWED[dtype]

        def by_kernels() -> Sequence[Tensor]:
            with normwise.backend("triton"):
                return norm.step(case.ours)

        def error(found: Sequence[Tensor]) -> float:
            return norm_cases.error_of(found, truth, allowed)

        return by_kernels, error
    layer = recurrent_cases.Built(case, device.type, dtype)
    exact = layer.truth()
    design = recurrent_cases.designs()[proof.design]
    call = layer.call(recurrent_cases.MODES[0], layer.layer, "triton", design)
    return call, lambda found: layer.error(found, exact)


def run(device: Device, log: Log) -> None:
    torch.manual_seed(0)
    log.each(proofs(device.dry), lambda one: one.name, lambda one, _: outcome(one, device), say)


def say(figure: dict[str, Any]) -> str:
    if "refused" in figure:
        return f"refused: {figure['refused']}"
    return f"{'WRONG' if figure['error'] > 1 else 'right'}: {figure['error']:.3f} of the allowed error"
