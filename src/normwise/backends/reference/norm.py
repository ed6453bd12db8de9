"""The one home of normalize-and-scale, forward and backward.

Every norm layer is a choice of four things: which axes share statistics (`dims`), which elements count (`mask`), where
the statistics come from (`mean` and `var`, or this input), and where gain and bias apply (the shapes of `weight` and
`bias`, which broadcast against the input).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from normwise.backends.protocol import Moments, accumulation_dtype
from normwise.backends.reference.moments import centre, count_valid, mean_square, rstd_of


def norm(
    x: Tensor,
    dims: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    eps: float,
    center: bool = True,
) -> tuple[Tensor, Moments]:
    """y = (x - mean) / sqrt(var + eps) * weight + bias, and 0 where `mask` is False.

    Args:
        x: floating tensor of any shape.
        dims: axes that share statistics.
        weight, bias: broadcastable to `x`, or None.
        mask: bool, broadcastable to `x` with as many axes, True = valid; invalid elements do not enter the statistics.
        mean, var: given statistics (e.g. running averages), broadcastable to `x`; None: those of `x`.
        eps: added to the variance, in units of x squared.
        center: False leaves the mean in and divides by the root of the mean square (RMSNorm).

    Returns:
        (y, moments): `y` has the dtype of `x`; `moments` are those used, in at least float32. Without `center` the
        mean is 0 and the variance is the mean square.
    """
    normalized, scale, used = _standardize(x, dims, mask, mean, var, eps, center)
    y = normalized * scale
    if weight is not None:
        y = y * _by_sample(weight, y)
    if bias is not None:
        y = y + _by_sample(bias, y)
    if mask is not None:
        y = y.masked_fill(~mask, 0)
    return y.to(x.dtype), used


def _by_sample(parameter: Tensor, y: Tensor) -> Tensor:
    """`parameter` spread over the samples by itself, so that its gradient is summed over them by itself: torch.sum adds
    in pairs along one axis, but not along two that are apart."""
    if parameter.dim() < y.dim() or parameter.shape[0] != 1:
        return parameter
    return parameter.expand(y.shape[0], *(-1,) * (y.dim() - 1))


def _sum_to_shape(t: Tensor, shape: torch.Size) -> Tensor:
    """`t.sum_to_size(shape)`, over the samples last, for the reason that `_by_sample` gives."""
    if len(shape) < t.dim() or shape[0] != 1:
        return t.sum_to_size(shape)
    return t.sum_to_size(t.shape[0], *shape[1:]).sum_to_size(shape)


def norm_backward(
    grad: Tensor,
    x: Tensor,
    dims: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    eps: float,
    center: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of `norm`'s y with respect to x, weight and bias, in closed form.

    With z = (x - mean) * rstd and g = grad * weight, both 0 where invalid, and E the mean over the valid elements:

        dx = rstd * (g - E[g] - z * E[g * z])      statistics of x (without E[g] if `center` is False)
        dx = rstd * g                              given statistics, which are constants
        dweight = sum(grad * z), dbias = sum(grad) over the axes along which each was broadcast

    Source: Ioffe & Szegedy 2015, section 3, rearranged.
    """
    dims = list(dims)
    normalized, scale, used = _standardize(x, dims, mask, mean, var, eps, center)
    z = normalized * scale
    grad = grad.to(z.dtype)
    if mask is not None:
        grad = grad.masked_fill(~mask, 0)
    g = grad if weight is None else grad * weight
    dx = g
    if mean is None and var is None:
        count = used.count.clamp(min=1)
        if center:
            dx = dx - g.sum(dims, keepdim=True) / count
        dx = dx - z * ((g * z).sum(dims, keepdim=True) / count)
    dx = dx * scale
    if mask is not None:
        dx = dx.masked_fill(~mask, 0)
    dweight = None if weight is None else _sum_to_shape(grad * z, weight.shape).to(weight.dtype)
    dbias = None if bias is None else _sum_to_shape(grad, bias.shape).to(bias.dtype)
    return dx.to(x.dtype), dweight, dbias


def _standardize(
    x: Tensor,
    dims: Sequence[int],
    mask: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    center: bool,
) -> tuple[Tensor, Tensor, Moments]:
    """(x - mean, 1 / sqrt(var + eps), the moments used)."""
    if mean is not None and var is not None:
        wide = x.to(accumulation_dtype(x.dtype))
        if mask is not None:
            wide = wide.masked_fill(~mask, 0)
        mean, var = mean.to(wide.dtype), var.to(wide.dtype)
        return wide - mean, rstd_of(var, eps), Moments(mean, var, torch.ones_like(var))
    if center:
        centred, mean, count = centre(x, dims, mask)
    else:
        centred = x.to(accumulation_dtype(x.dtype))
        if mask is not None:
            centred = centred.masked_fill(~mask, 0)
        count = count_valid(centred, dims, mask)
        mean = torch.zeros_like(count)
    var = mean_square(centred, dims, count)
    return centred, rstd_of(var, eps), Moments(mean, var, count)
