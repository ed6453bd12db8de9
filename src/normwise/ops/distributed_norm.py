"""`ops.norm` with the statistics of all ranks: one exchange forward and one backward.

The third answer, "where the statistics come from", for batches that are spread over ranks (SyncBatchNorm) and for
features that are (LayerNorm and RMSNorm of a shard). It runs on any device in plain PyTorch operations.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from normwise.backends.reference import (
    Moments,
    accumulation_dtype,
    centre_in_two,
    combined,
    count_valid,
    mean_square,
    rstd_of,
)
from normwise.ops import distributed


def distributed_norm(
    x: Tensor,
    dims: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    group: dist.ProcessGroup,
    mask: Tensor | None = None,
    eps: float,
    center: bool = True,
    count_each: bool = False,
) -> tuple[Tensor, Moments]:
    """`normwise.reference.norm` with mean and variance over `dims` of all ranks' inputs together.

    The gradients are those of the sum of all ranks' losses, with respect to this rank's own x, weight and bias. In a
    backward that will be differentiated again (`create_graph=True`) the forward's exchange is repeated, and its
    gradient is a third one.

    Args:
        group: the ranks; each gives its part of the elements, which may be none.
        count_each: exchange a count for each statistic, so that a mask may be of any shape and differ between ranks;
            otherwise one number, for inputs without a mask.

    Returns:
        (y, moments): `y` like `x`; `moments` of all ranks, in float64, without a gradient.
    """
    if torch.compiler.is_compiling():
        y, mean, var, count, *_ = torch.ops.normwise.distributed_norm(
            x, weight, bias, mask, list(dims), group.group_name, eps, center, count_each
        )
        return y, Moments(mean, var, count)
    settings = Settings(tuple(dims), group, eps, center, count_each)
    y, *moments = _DistributedNorm.apply(x, weight, bias, mask, settings)
    return y, Moments(*moments)


class Settings(NamedTuple):
    dims: tuple[int, ...]
    group: dist.ProcessGroup
    eps: float
    center: bool
    count_each: bool


class _Local(NamedTuple):
    """This rank's centred elements, and what was subtracted from them: in two parts, for precision."""

    centred: Tensor
    rough: Tensor
    rest: Tensor
    elements: Tensor


def _local(x: Tensor, mask: Tensor | None, settings: Settings) -> _Local:
    if settings.center:
        return _Local(*centre_in_two(x, settings.dims, mask))
    wide = x.to(accumulation_dtype(x.dtype))
    if mask is not None:
        wide = wide.masked_fill(~mask, 0)
    count = count_valid(wide, settings.dims, mask)
    return _Local(wide, torch.zeros_like(count), torch.zeros_like(count), count)


def _pool(x: Tensor, local: _Local, settings: Settings) -> Moments:
    """The moments of all ranks; differentiable where `local` is."""
    var = mean_square(local.centred, settings.dims, local.elements)
    count = local.elements.expand_as(var) if settings.count_each else local.elements
    if settings.center:
        mean = local.rough.double() + local.rest.double()
        parts = Moments(*distributed.gather([mean, var, count], settings.group, x.dtype))
    else:
        var, count = distributed.gather([var, count], settings.group, x.dtype)
        parts = Moments(torch.zeros_like(count), var, count)
    return combined(parts)


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mask: Tensor | None, settings: Settings
) -> tuple[Tensor, ...]:
    """(y, mean, var, count) and what the backward needs: (rough, offset, rstd), where the mean is rough + offset."""
    local = _local(x, mask, settings)
    moments = _pool(x, local, settings)
    z = local.centred
    # What is left to subtract: small, so that it may be rounded.
    offset = (moments.mean - local.rough.double()).to(z.dtype)
    rstd = rstd_of(moments.var, settings.eps).to(z.dtype)
    left = local.rest - offset
    if settings.center and _per_statistic(rstd, weight, bias):
        scale = rstd if weight is None else (rstd * weight).to(z.dtype)
        shift = left * scale if bias is None else (left * scale + bias).to(z.dtype)
        y = torch.addcmul(shift, z, scale, out=z)
    else:
        # Uncentred elements may be the input itself, which stays as it is.
        z = z.add_(left).mul_(rstd) if settings.center else z * rstd
        y = z if weight is None else z.mul_(weight)
        y = y if bias is None else y.add_(bias)
    y = y if mask is None else y.masked_fill_(~mask, 0)
    return y.to(x.dtype), *moments, local.rough, offset, rstd


def backward_of(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    rough: Tensor,
    offset: Tensor,
    rstd: Tensor,
    count: Tensor,
    settings: Settings,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(dx, dweight, dbias): `reference.norm_backward` with sums over all ranks."""
    dims = list(settings.dims)
    dy = dy.to(rstd.dtype)
    z = x.to(rstd.dtype)
    if mask is not None:
        dy, z = dy.masked_fill(~mask, 0), z.masked_fill(~mask, 0)
    z = (z - rough).sub_(offset).mul_(rstd) if settings.center else z * rstd
    if mask is not None:
        z.masked_fill_(~mask, 0)
    if settings.center and _per_statistic(rstd, weight, bias):
        both = torch.stack([(dy * z).sum(dims, keepdim=True), dy.sum(dims, keepdim=True)])
        gain = 1.0 if weight is None else weight.to(z.dtype)
        means = distributed.sum_over_ranks(both * gain, settings.group) / count.to(rstd.dtype).clamp(min=1)
        dx = z.mul_(means[0] * -rstd).sub_(means[1] * rstd).addcmul_(dy, rstd * gain)
        dx = dx if mask is None else dx.masked_fill_(~mask, 0)
        dweight, dbias = (None if t is None else d.to(t.dtype) for d, t in zip(both, (weight, bias), strict=True))
        return dx.to(x.dtype), dweight, dbias
    g = dy if weight is None else dy * weight
    sums = [(g * z).sum(dims, keepdim=True), *([g.sum(dims, keepdim=True)] if settings.center else [])]
    # Also where this rank needs no input gradient: others may, and wait for this rank's part.
    means = distributed.sum_over_ranks(torch.stack(sums), settings.group) / count.to(rstd.dtype).clamp(min=1)
    dx = torch.addcmul(g, z, means[0], value=-1)
    dx = (dx.sub_(means[1]) if settings.center else dx).mul_(rstd)
    dx = dx if mask is None else dx.masked_fill_(~mask, 0)
    dweight = None if weight is None else (dy * z).sum_to_size(weight.shape).to(weight.dtype)
    dbias = None if bias is None else dy.sum_to_size(bias.shape).to(bias.dtype)
    return dx.to(x.dtype), dweight, dbias


def _per_statistic(rstd: Tensor, *parameters: Tensor | None) -> bool:
    """Whether gain and bias have one number per statistic, as in BatchNorm: this takes fewer passes over the input."""
    return all(p is None or p.shape == rstd.shape for p in parameters)


class _DistributedNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, mask: Tensor | None, settings: Settings
    ) -> tuple[Tensor, ...]:
        y, mean, var, count, *kept = forward(x, weight, bias, mask, settings)
        ctx.save_for_backward(x, weight, bias, mask, *kept, count)
        ctx.settings = settings
        ctx.mark_non_differentiable(mean, var, count)
        return y, mean, var, count

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> Any:
        x, weight, bias, mask, rough, offset, rstd, count = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *_differentiable_backward(dy, x, weight, bias, mask, ctx.settings), None, None
        return *backward_of(dy, x, weight, bias, mask, rough, offset, rstd, count, ctx.settings), None, None


def _differentiable_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, mask: Tensor | None, settings: Settings
) -> tuple[Tensor | None, ...]:
    """The same gradients with a graph: those of the forward in operations that autograd differentiates by itself."""
    leaves = [None if t is None else t if t.requires_grad else t.detach().requires_grad_() for t in (x, weight, bias)]
    x, weight, bias = leaves  # type: ignore[assignment]
    local = _local(x, mask, settings)
    moments = _pool(x, local, settings)
    wide = local.centred.dtype
    # Both means are known to more digits than `wide` has, their difference need not be.
    own = local.rough.double() + local.rest.double()
    y = (local.centred + (own - moments.mean).to(wide)) * rstd_of(moments.var, settings.eps).to(wide)
    y = y if weight is None else y * weight
    y = y if bias is None else y + bias
    y = y if mask is None else y.masked_fill(~mask, 0)
    wanted = [t for t in leaves if t is not None]
    found = iter(torch.autograd.grad(y.to(x.dtype), wanted, dy, create_graph=True))
    return tuple(None if t is None else next(found) for t in leaves)
