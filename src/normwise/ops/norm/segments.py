"""Statistics of segments: rows that belong together, wherever they stand (the nodes of a graph, the points of a cloud,
the tokens of a packed document). The second answer of a norm, which elements share statistics, given row by row."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from normwise.backends.activations import activation, add_residual_and_activate
from normwise.backends.protocol import Moments, accumulation_dtype
from normwise.backends.reference.moments import rstd_of
from normwise.ops import conversion, dispatch
from normwise.ops.errors import ShapeError


class Segments(NamedTuple):
    """`of_row` (R,) int64: the segment of each row; there are at most `most` of them."""

    of_row: Tensor
    most: int


def segments_of(op: str, segments: Any, x: Tensor, **excluded: Any) -> Segments:
    """The argument `segments` of a norm `op` of rows `x`.

    Raises:
        TypeError: not integers. ShapeError: not one for each row. ValueError: a negative number (on the CPU); together
            with one of the `excluded` arguments.
    """
    for name, value in excluded.items():
        if value is not None:
            raise ValueError(f"{op}: got segments together with {name}: the rows (R, ...) of a segment need no {name}")
    found = conversion.as_tensor("segments", segments, "integers, one for each row of the input")
    if found.dtype == torch.bool or found.is_floating_point() or found.is_complex():
        raise TypeError(f"segments must be of an integer dtype, but got {found.dtype}: give the number of each row's")
    if x.dim() < 2 or tuple(found.shape) != (x.shape[0],):
        raise ShapeError(
            f"segments must be of shape (R,), one number for each row of an input (R, ...), but got "
            f"{tuple(found.shape)} for an input of shape {tuple(x.shape)}"
        )
    found = found.to(x.device, torch.int64)
    if not (x.shape[0] and dispatch.values_visible(found)):
        return Segments(found, x.shape[0])  # a look at the largest number would wait for the device
    low, high = int(found.min()), int(found.max())
    if low < 0:
        raise ValueError(f"segments must be 0 or larger, but got {low}: rows of no segment are left out by mask=")
    if high >= x.shape[0]:  # numbers far apart: close the gaps
        found = torch.unique(found, return_inverse=True)[1]
        high = int(found.max())
    return Segments(found, high + 1)


def segment_norm(
    op: str,
    x: Tensor,
    segments: Segments,
    *,
    across_features: bool,
    eps: float,
    center: bool = True,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    valid: Tensor | None = None,
    act: str | None = None,
    residual: Tensor | None = None,
) -> tuple[Tensor, Moments]:
    """act((x - mean) / sqrt(var + eps) * weight + bias + residual) of rows (R, ...), each by the statistics of its
    segment, and these, (segments, ...).

    Args:
        across_features: one mean and variance for all features of a segment; otherwise one for each feature.
        center: False leaves the mean in and divides by the root of the mean square.
        weight, bias: of one row, or as `x`.
        valid: bool, broadcastable to `x`, with as many axes.
    """
    dispatch.reference_only(op, "statistics of segments are the reference's alone")
    if act is not None:
        activation(act)
    # In float64 where that is quick: rows are added up one after the other.
    wide = torch.float64 if x.device.type == "cpu" else accumulation_dtype(x.dtype)
    values = x.to(wide)
    if valid is not None:
        values = values.masked_fill(~valid, 0)
    features = tuple(range(1, x.dim()))
    count = _sums(values.new_ones(1).expand_as(values) if valid is None else valid.expand_as(values).to(wide), segments)
    if across_features:
        count = count.sum(features, keepdim=True)
    divisor = count.clamp(min=1)

    def mean_of(t: Tensor) -> Tensor:
        sums = _sums(t, segments)
        return (sums.sum(features, keepdim=True) if across_features else sums) / divisor

    mean = mean_of(values) if center else torch.zeros_like(count)
    centred = values - mean.index_select(0, segments.of_row) if center else values
    if valid is not None:
        centred = centred.masked_fill(~valid, 0)
    var = mean_of(centred.square())
    y = centred * rstd_of(var, eps).index_select(0, segments.of_row)
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    y = y if valid is None else y.masked_fill(~valid, 0)
    return add_residual_and_activate(y, residual, act, valid).to(x.dtype), Moments(mean.detach(), var.detach(), count)


def _sums(values: Tensor, segments: Segments) -> Tensor:
    """Sums over the rows of each segment. By index_add, whose gradient is a selection: that of a selection by repeated
    indices would be one row after the other (torch adds them up in no order on a GPU)."""
    return values.new_zeros(segments.most, *values.shape[1:]).index_add(0, segments.of_row, values)
