"""Norms with a mask on a GPU in as few of ATen's kernels as there can be.

Invalid elements become 0 after a rough mean was subtracted, so ATen's kernels may run over all of them: what they
find is corrected by the share of valid elements, a number a statistic that never leaves the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from normwise.backends.channels import channel_dims, channel_shape
from normwise.backends.protocol import Moments, NormConfig, NormFamily, NormGradients, NormResult, accumulation_dtype


def channels(
    config: NormConfig,
    x: Tensor,
    residual: None,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    needs_grad: bool,
) -> NormResult:
    """BatchNorm by the batch's statistics, without residual or activation; no running average is moved yet.

    `stats` is (4, C): a rough mean, what is left of the mean, the variance, and 1 / count.
    """
    count, dims = x.numel() // x.shape[1], channel_dims(x)
    wide = x.to(accumulation_dtype(x.dtype))
    # Not by `where`, which makes a tensor of its 0, by a launch of its own.
    invalid = ~mask
    share = mask.mean(dims, keepdim=True, dtype=wide.dtype)
    divisor = share.clamp(min=0.5 / count)  # where nothing is valid, of zeros
    rough = wide.masked_fill(invalid, 0).mean(dims, keepdim=True) / divisor
    centered = (wide - rough).masked_fill_(invalid, 0)
    var, rest = torch.var_mean(centered, dims, correction=0, keepdim=True)
    var, rest = var / divisor, rest / divisor
    y = _transform(centered, weight, bias, rest, var, config.eps)
    stats = moments = None
    if needs_grad:
        per_element = (divisor * count).reciprocal().expand_as(rough)
        stats = torch.stack([t.flatten() for t in (rough, rest, var, per_element)])
    if running_mean is not None:
        mean = (rough + rest).flatten()
        moments = Moments(mean, var.flatten(), (share * count).flatten().expand_as(mean))
    return NormResult(y.masked_fill_(invalid, 0).to(x.dtype), x, stats, True if moments is None else None, moments)


def backward(
    config: NormConfig,
    total: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor,
    stats: Tensor,
    dy: Tensor,
    dtotal: None,
) -> NormGradients:
    """The gradients in closed form: those for given statistics, and what flows through the statistics, which is an
    affine function of x for each channel again."""
    rough, rest, var, per_element = stats.unbind(0)
    invalid, wide = ~mask, total.to(stats.dtype)
    centered = (wide - rough.view(channel_shape(total))).masked_fill_(invalid, 0)
    grad = dy.to(stats.dtype).masked_fill(invalid, 0)
    gain = None if weight is None else weight.to(stats.dtype)
    dx, dgain, dshift = torch.ops.aten.native_batch_norm_backward(
        grad, centered, gain, rest, var, None, None, False, config.eps, [True, True, True]
    )
    slope = torch.rsqrt(var + config.eps) * per_element
    slope = slope if gain is None else slope * gain
    dx = dx.sub_(_transform(centered, dgain * slope, dshift * slope, rest, var, config.eps)).masked_fill_(invalid, 0)
    return NormGradients(
        dx.to(total.dtype),
        None,
        None if weight is None else dgain.to(weight.dtype),
        None if bias is None else dshift.to(bias.dtype),
    )


def _transform(x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias by ATen's kernel of evaluation."""
    weight, bias = (None if t is None else t.to(x.dtype).contiguous() for t in (weight, bias))
    cudnn = torch.backends.cudnn.enabled
    return torch.batch_norm(x, weight, bias, mean.flatten(), var.flatten(), False, 0.0, eps, cudnn)


FAMILY = NormFamily(channels, backward)
