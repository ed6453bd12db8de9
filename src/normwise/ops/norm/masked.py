"""Norms of channels and groups with a mask on a GPU: each is a BatchNorm, whose kernels see one form."""

from __future__ import annotations

import torch
from torch import Tensor

from normwise.backends.activations import add_residual_and_activate, channels_laid_out_like
from normwise.backends.channels import channel_shape
from normwise.backends.protocol import Moments, NormFamily, NormRequest, NormResult, accumulation_dtype
from normwise.ops.autograd import Norm


def run(family: NormFamily, request: NormRequest, needs_grad: bool) -> NormResult:
    """A request by the masked `family` of a backend, which knows BatchNorm alone: residual and activation follow in
    torch's operations."""
    x, mask = request.x, request.mask
    assert mask is not None
    config = request.config._replace(act=None)
    bare = request._replace(config=config, residual=None)
    if config.family == "groups":
        bare = _as_channels(request)._replace(config=config._replace(family="channels"))
    result = NormResult(*Norm.apply(family, bare, *bare[1:5])) if needs_grad else family.forward(*bare, False)
    y, moments = result.y, result.moments
    if config.family == "groups":
        y = y.view(x.shape)
        if moments is not None:  # one a sample and channel
            moments = Moments(*(m.view(x.shape[:2]) for m in moments))
        y = channels_laid_out_like(_affine(y, request.weight, request.bias, mask), x)
    y = add_residual_and_activate(y, request.residual, request.config.act, mask)
    return result._replace(y=y, total=x, moments=moments)


def _as_channels(request: NormRequest) -> NormRequest:
    """Each group of each sample as a channel of a batch of one, without gain and bias."""
    x, mask, groups = request.x, request.mask, request.config.groups
    assert mask is not None
    form = (1, x.shape[0] * groups, x.numel() // max(x.shape[0] * groups, 1))
    return request._replace(
        x=x.reshape(form), mask=mask.expand_as(x).reshape(form), residual=None, weight=None, bias=None
    )


def _affine(y: Tensor, weight: Tensor | None, bias: Tensor | None, mask: Tensor) -> Tensor:
    """y * weight + bias by channel, 0 where invalid, computed in float32 at least and rounded once more."""
    shape = channel_shape(y)[1:]
    wide = accumulation_dtype(y.dtype)
    gain, shift = (None if t is None else t.to(wide).view(shape) for t in (weight, bias))
    if shift is not None:
        z = y + shift if gain is None else torch.addcmul(shift, y.to(wide), gain)
        return z.masked_fill(~mask, 0).to(y.dtype)
    return y if gain is None else (y * gain).to(y.dtype)
