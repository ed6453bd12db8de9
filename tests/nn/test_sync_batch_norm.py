"""SyncBatchNorm on several ranks equals BatchNorm over the concatenated batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import normwise
from support.backends import using
from support.derivatives import derivatives
from support.norm_cases import randomize
from support.on_ranks import on_ranks
from support.tolerances import assert_close

CHANNELS = 4
# Samples on each rank, by number of ranks.
BATCHES = {2: [[3, 2], [0, 4]], 3: [[1, 4, 2], [3, 0, 0]], 4: [[1, 1, 1, 1], [2, 0, 5, 1]]}

Case = tuple[tuple[int, ...], dict[str, Any], dict[str, Any]]  # positions, arguments of the layer, of the call
CASES: list[Case] = [
    ((), {}, {}),
    ((), {"momentum": None, "affine": False}, {}),
    ((5,), {"bias": False, "act": "gelu"}, {"lengths": True}),
    ((5,), {"track_running_stats": False}, {"mask": (5,)}),
    ((3, 4), {"act": "silu", "eps": 1e-3}, {"residual": True}),
    ((3, 4), {}, {"mask": (3, 4), "residual": True}),
    ((3, 4), {"momentum": 0.4}, {"mask": (CHANNELS, 3, 4)}),
    ((2, 3, 2), {}, {}),
]
STEPS = 2


def data(
    case: Case, batches: list[int], dtype: torch.dtype, offset: float, step: int
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The concatenated batch of one step: tensors, and further arguments of the call. The same on every rank."""
    positions, _, call = case
    torch.manual_seed(step)
    shape = (sum(batches), CHANNELS, *positions)
    x, residual, upstream, second = (torch.randn(shape, dtype=torch.float64) for _ in range(4))
    # Each rank's values around a mean of its own, so that statistics of one rank alone would be far off.
    means = torch.repeat_interleave(torch.arange(len(batches)), torch.tensor(batches)).double()
    tensors = {"x": x + offset + means.view(-1, *(1,) * (x.dim() - 1)), "upstream": upstream, "second": second}
    if "residual" in call:
        tensors["residual"] = residual
    more: dict[str, Any] = {}
    if "mask" in call:
        more["mask"] = torch.rand(sum(batches), *call["mask"]) < 0.7
    if "lengths" in call:
        more["lengths"] = torch.randint(0, positions[-1] + 1, (sum(batches),))
        more["lengths"][-1] = positions[-1]
    return {name: t.to(dtype) for name, t in tensors.items()}, more


def layer_of(kind: Any, case: Case, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(7)
    return randomize(kind(CHANNELS, **case[1], dtype=dtype))


def synced(batches: list[int], cases: list[Case], dtype: torch.dtype, offset: float) -> list[list[dict[str, Tensor]]]:
    """For each case and step what this rank computes, and the layer's buffers then."""
    low = sum(batches[: dist.get_rank()])
    own = slice(low, low + batches[dist.get_rank()])
    found = []
    for case in cases:
        layer = layer_of(normwise.SyncBatchNorm, case, dtype)
        found.append([])
        for step in range(STEPS):
            tensors, more = data(case, batches, dtype, offset, step)
            computed = derivatives(layer, {k: t[own] for k, t in tensors.items()}, {k: t[own] for k, t in more.items()})
            found[-1].append(computed | {name: b.clone() for name, b in layer.named_buffers()})
    return found


@pytest.mark.parametrize("size", [2, 3, 4])
def test_equal_to_the_concatenated_batch(size: int) -> None:
    for batches in BATCHES[size]:
        compare(batches, CASES, torch.float64)


@pytest.mark.parametrize(("dtype", "offset"), [(torch.float32, 1e4), (torch.bfloat16, 0.0)], ids=str)
def test_other_dtypes_match_float64(dtype: torch.dtype, offset: float) -> None:
    """Also where the mean dwarfs the deviation. What follows the norm would be rounded again."""
    plain = [case for case in CASES if "act" not in case[1] and "residual" not in case[2]]
    compare([2, 0, 3], plain, dtype, offset)


def compare(batches: list[int], cases: list[Case], dtype: torch.dtype, offset: float = 0.0) -> None:
    parts = on_ranks(len(batches), synced, batches, cases, dtype, offset)
    kinds = {2: normwise.BatchNorm1d, 3: normwise.BatchNorm1d, 4: normwise.BatchNorm2d, 5: normwise.BatchNorm3d}
    for i, case in enumerate(cases):
        whole = layer_of(kinds[2 + len(case[0])], case, dtype).double()
        for step in range(STEPS):
            tensors, more = data(case, batches, dtype, offset, step)
            with using("reference"):
                truth = derivatives(whole, {k: t.double() for k, t in tensors.items()}, more)
            of_ranks = [part[i][step] for part in parts]
            for name, expected in truth.items():
                shares = [r[name] for r in of_ranks]
                # A parameter's gradients add up; what has samples is concatenated.
                got = torch.cat(shares) if expected.dim() > 1 else torch.stack(shares).to(torch.float64).sum(0)
                kind = "forward" if name == "output" else "composed" if name.startswith("second") else "grad"
                named = f"{case} step {step} {name}"
                assert_close(got, expected, kind=kind, dtype=dtype, count=expected.numel(), name=named)
            for name, expected in whole.named_buffers():
                assert all(torch.equal(r[name], of_ranks[0][name]) for r in of_ranks), name
                assert_close(of_ranks[0][name], expected, kind="composed", dtype=dtype, name=f"{case} {name}")
