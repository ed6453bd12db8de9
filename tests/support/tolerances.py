"""How close is close: the one table of tolerances, and the one function that applies it.

Every allowance is a multiple of a unit of rounding, so that it has a reason, and comes in two parts:

    |actual - expected| <= rtol * |expected| + sqrt(count) * sum_tol * scale + one subnormal step

- `rtol` is for rounding the result itself (and, for composed operations, their intermediate results).
- `sum_tol` is for the sums inside: their error does not shrink where the result happens to be near zero, so
  it is measured against `scale`, the size of what was added and subtracted (default: the largest |expected|).
  Rounding errors of a sum walk at random, so they grow with the square root of the `count` of its terms.

A forward sums in float32 or better whatever the input's dtype, so half precision does not loosen `sum_tol`.
The same numbers hold everywhere: nothing here depends on the machine, the device or CI.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Kind = Literal["forward", "grad", "composed"]


class Tolerance(NamedTuple):
    rtol: float
    sum_tol: float


F32 = torch.finfo(torch.float32).eps  # 1.2e-7
BF16 = torch.finfo(torch.bfloat16).eps  # 7.8e-3
F16 = torch.finfo(torch.float16).eps  # 9.8e-4

TABLE: dict[tuple[torch.dtype, Kind], Tolerance] = {
    # float64 stands for exact arithmetic: any slip into float32 (6e-8) must fail, while the order of a sum
    # (1e-16 a term, times the condition of a variance near eps) must not.
    (torch.float64, "forward"): Tolerance(1e-12, 1e-12),
    (torch.float64, "grad"): Tolerance(1e-10, 1e-10),
    (torch.float64, "composed"): Tolerance(1e-10, 1e-10),
    # Subtract the mean, scale, gain, bias: four roundings; rstd carries half the error of a variance.
    (torch.float32, "forward"): Tolerance(8 * F32, 8 * F32),
    # A norm's input gradient subtracts two means from the upstream gradient: more terms, each rounded.
    (torch.float32, "grad"): Tolerance(16 * F32, 32 * F32),
    # Several operations in a row (norm, residual, activation; steps of a recurrence), each rounding anew.
    (torch.float32, "composed"): Tolerance(32 * F32, 64 * F32),
    # Half precision rounds once, at the store: half an eps, and another half if the truth was stored so too.
    (torch.bfloat16, "forward"): Tolerance(1 * BF16, 16 * F32),
    (torch.float16, "forward"): Tolerance(1 * F16, 16 * F32),
    # Gradients arrive rounded from the layer above the norm and are rounded again at each store on the way.
    (torch.bfloat16, "grad"): Tolerance(2 * BF16, BF16 / 4),
    (torch.float16, "grad"): Tolerance(2 * F16, F16 / 4),
    # Each intermediate tensor is stored in half precision, so its rounding counts against its own size.
    (torch.bfloat16, "composed"): Tolerance(2 * BF16, BF16),
    (torch.float16, "composed"): Tolerance(2 * F16, F16),
}


def tolerance(dtype: torch.dtype, kind: Kind = "forward", *, count: int = 1, scale: float = 1.0) -> dict[str, float]:
    """`{"rtol": ..., "atol": ...}` for functions that take the pair, such as `torch.allclose`."""
    rtol, sum_tol = TABLE[dtype, kind]
    info = torch.finfo(dtype)
    return {"rtol": rtol, "atol": sum_tol * math.sqrt(count) * scale + info.smallest_normal * info.eps}


def assert_close(
    actual: Tensor,
    expected: Tensor,
    *,
    kind: Kind = "forward",
    dtype: torch.dtype | None = None,
    count: int = 1,
    scale: float | None = None,
    name: str = "result",
) -> None:
    """Fail unless `actual` equals `expected` up to the rounding that its arithmetic allows.

    Args:
        actual: the result under test. Shapes must agree; NaN and inf must stand in the same places.
        expected: the truth, best in float64 and never rounded.
        kind: "forward" (rounded once), "grad", or "composed" (several stored steps).
        dtype: the dtype that the arithmetic is held to; default: `actual.dtype`.
        count: how many terms each sum inside has: elements per statistic, rows per parameter gradient, steps.
        scale: the size of what was added and subtracted, where that is more than the largest |expected|:
            a mean of 1e4 taken from inputs near 1e4, or gradients whose exact value is zero.
        name: what to call the tensor in the message.
    """
    dtype = actual.dtype if dtype is None else dtype
    truth = expected.detach().double().cpu()
    if scale is None:
        finite = truth[truth.isfinite()]
        scale = finite.abs().max().item() if finite.numel() else 0.0
    allowed = tolerance(dtype, kind, count=count, scale=scale)
    torch.testing.assert_close(
        actual.detach().double().cpu(),
        truth,
        equal_nan=True,
        **allowed,
        msg=lambda text: f"{name} ({dtype}, {kind}, count={count}, scale={scale:.3g}): {text}",
    )
