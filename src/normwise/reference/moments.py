"""The one home of means and variances."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Moments(NamedTuple):
    """Statistics of a tensor over some of its axes, which are kept with size 1.

    `var` is biased (divided by `count`). `count` is how many elements entered; where it is 0, so are `mean` and `var`.
    """

    mean: Tensor
    var: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count, which nobody needs here


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that statistics of `dtype` are computed and kept in: at least float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def centre(x: Tensor, dims: Sequence[int], mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Subtract from `x` its mean over the valid elements of `dims`; invalid elements become 0.

    Args:
        x: floating tensor of any shape.
        dims: axes that share one mean.
        mask: bool, broadcastable to `x`, True = valid; None means that every element is valid.

    Returns:
        (centred, mean, count): `centred` like `x` in `accumulation_dtype(x.dtype)`, the others with `dims` kept as 1.
    """
    centred, rough, rest, count = centre_in_two(x, dims, mask)
    return centred, rough + rest, count


def centre_in_two(x: Tensor, dims: Sequence[int], mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`centre` as (centred, rough, rest, count), where the mean is rough + rest.

    The mean is subtracted twice, first a rough one and then the mean of what is left: near 1e4 two neighbouring
    float32 numbers lie 1e-3 apart, so a mean rounded to float32 would leave an error of that size in every element.
    """
    dims = list(dims)
    x = x.to(accumulation_dtype(x.dtype))
    if mask is not None:
        # Selected before any arithmetic: padding may hold anything, NaN included.
        x = x.masked_fill(~mask, 0)
    count = count_valid(x, dims, mask)
    divisor = count.clamp(min=1)
    rough = (x.sum(dims, keepdim=True) / divisor).detach()
    centred = x - rough
    if mask is not None:
        centred = centred.masked_fill(~mask, 0)
    rest = centred.sum(dims, keepdim=True) / divisor
    centred = centred - rest
    if mask is not None:
        centred = centred.masked_fill(~mask, 0)
    return centred, rough, rest, count


def moments(x: Tensor, dims: Sequence[int], mask: Tensor | None = None) -> Moments:
    """Mean and biased variance of the valid elements of `x` over `dims` (two passes, in at least float32)."""
    centred, mean, count = centre(x, dims, mask)
    return Moments(mean, mean_square(centred, dims, count), count)


def combined(parts: Moments) -> Moments:
    """The moments of all elements together, from those of disjoint parts that are stacked along axis 0.

    With N = sum(count): mean = sum(count * mean) / N, var = sum(count * (var + (mean_part - mean)^2)) / N. Parts
    without an element do not count. No sum of squares of uncentred numbers occurs, so no digits are lost.

    Source: Chan, Golub & LeVeque 1979, eq. 2.1.
    """
    count = parts.count.sum(0)
    share = parts.count / count.clamp(min=1)
    mean = (share * parts.mean).sum(0)
    var = (share * (parts.var + (parts.mean - mean).square())).sum(0)
    return Moments(mean, var, count)


def mean_square(x: Tensor, dims: Sequence[int], count: Tensor) -> Tensor:
    """Sum of squares over `dims` divided by `count` (by 1 where nothing was counted)."""
    return x.square().sum(list(dims), keepdim=True) / count.clamp(min=1)


def rstd_of(var: Tensor, eps: float) -> Tensor:
    """1 / sqrt(var + eps). A variance that has left the range of its dtype gives NaN: 1 over infinity would make zeros
    of an input that exploded, and hide it."""
    return torch.rsqrt(var + eps) + var * 0


def count_valid(x: Tensor, dims: Sequence[int], mask: Tensor | None) -> Tensor:
    """How many elements of `dims` are valid, broadcastable against the statistics of `x`."""
    if mask is None:
        size = 1
        for d in dims:
            size = size * x.shape[d]
        return torch.full([1] * x.dim(), size, dtype=x.dtype, device=x.device)
    size = 1
    for d in dims:
        if mask.shape[d] == 1:  # the mask says the same for the whole axis
            size = size * x.shape[d]
    return mask.sum(list(dims), keepdim=True).to(x.dtype) * size
