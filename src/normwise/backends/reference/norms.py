"""Every norm in terms of the one formula of `reference.norm`, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from normwise.backends.activations import ACTIVATIONS, GATES, add_residual_and_activate, channels_laid_out_like
from normwise.backends.channels import channel_dims, channel_shape
from normwise.backends.protocol import (
    Gate,
    Moments,
    NormConfig,
    NormFamily,
    NormGradients,
    NormResult,
    accumulation_dtype,
)
from normwise.backends.reference.norm import norm, norm_backward

Formula = Callable[..., tuple[Tensor, Moments]]


def run(
    formula: Formula,
    config: NormConfig,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    needs_grad: bool,
) -> NormResult:
    """A request by `formula`, which takes the arguments of `reference.norm`: that itself, or one with its signature
    (a node of torch.compile, a norm over several ranks)."""
    before, after = (residual, None) if config.family == "features" else (None, residual)
    if before is not None:
        x = x + before
        x = x if mask is None else x.masked_fill(~mask, 0)
    form = _Form(config, _as_autocast(config, x), weight, bias, mask)
    options: dict[str, Any] = {}
    if not config.batch_statistics:
        options = {"mean": form.per_channel(running_mean), "var": form.per_channel(running_var)}
    y, moments = formula(
        form.x, form.dims, form.weight, form.bias, mask=form.mask, eps=config.eps, center=config.center, **options
    )
    y = add_residual_and_activate(y.reshape(x.shape), after, config.act, mask)
    if config.family == "groups":
        y = channels_laid_out_like(y, x)
    to_update = config.batch_statistics and running_mean is not None
    return NormResult(y, x, None, None if to_update else True, Moments(*(m.detach() for m in moments)))


def backward(
    config: NormConfig,
    total: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    stats: Tensor | None,
    dy: Tensor,
    dtotal: Tensor | None,
) -> NormGradients:
    """The gradients in closed form, in operations that autograd can differentiate again."""
    form = _Form(config, total, weight, bias, mask)
    options: dict[str, Any] = {"mask": form.mask, "eps": config.eps, "center": config.center}
    if not config.batch_statistics:
        assert stats is not None
        options |= {"mean": form.per_channel(stats[0]), "var": form.per_channel(stats[1].pow(-2) - config.eps)}
    if mask is not None:
        dy = dy.masked_fill(~mask, 0)
    if config.act is not None:
        y = norm(form.x, form.dims, form.weight, form.bias, **options)[0].reshape(total.shape)
        after = None if config.family == "features" else residual
        dy = _activation_backward(config.act, add_residual_and_activate(y, after, None, mask), dy)
    dx, dweight, dbias = norm_backward(dy.reshape(form.x.shape), form.x, form.dims, form.weight, form.bias, **options)
    dx = dx.reshape(total.shape)
    if dtotal is not None:
        dx = dx + (dtotal if mask is None else dtotal.masked_fill(~mask, 0))
    return NormGradients(
        dx,
        dx if config.family == "features" else dy,
        None if dweight is None or weight is None else dweight.reshape(weight.shape),
        None if dbias is None or bias is None else dbias.reshape(bias.shape),
    )


def gated(
    config: NormConfig,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    gate: Gate,
) -> Tensor:
    """y of the family "features" with a gate, rounded once, to the dtype of `x`."""
    wide, values = (t.to(accumulation_dtype(x.dtype)) for t in (x, gate.values))
    if mask is not None:
        wide, values = wide.masked_fill(~mask, 0), values.masked_fill(~mask, 0)
    opened = values if gate.act is None else GATES[gate.act](values)
    form = _Form(config, wide * opened if gate.first else wide, weight, bias, mask)
    y, _ = norm(form.x, form.dims, weight, bias, mask=mask, eps=config.eps, center=config.center)
    y = y if gate.first else y * opened
    return add_residual_and_activate(y, None, config.act, mask).to(x.dtype)


def _as_autocast(config: NormConfig, x: Tensor) -> Tensor:
    """On the devices where autocast runs layer_norm, group_norm and rms_norm in float32, so do we."""
    kind = x.device.type
    if config.family != "channels" and kind in ("cuda", "xpu") and x.dtype != torch.float64:
        return x.float() if torch.is_autocast_enabled(kind) else x
    return x


def _activation_backward(act: str, z: Tensor, dy: Tensor) -> Tensor:
    """The gradient at `z` of act(z), differentiable in both arguments."""
    at = z if z.requires_grad else z.detach().requires_grad_()
    with torch.enable_grad():  # off where no gradient of this gradient is asked for
        (slope,) = torch.autograd.grad(ACTIVATIONS[act](at).sum(), at, create_graph=z.requires_grad)
    return slope * dy


class _Form:
    """The tensors of a request as `reference.norm` takes them: `dims` share statistics, the others broadcast."""

    def __init__(
        self, config: NormConfig, x: Tensor, weight: Tensor | None, bias: Tensor | None, mask: Tensor | None
    ) -> None:
        self.x, self.mask, self.weight, self.bias = x, mask, weight, bias
        if config.family == "features":  # gain and bias broadcast as they are
            self.dims = tuple(range(x.dim() - config.axes, x.dim()))
            return
        self.shape, self.dims = channel_shape(x), channel_dims(x)
        if config.family == "groups":
            split = (config.groups, x.shape[1] // config.groups if config.groups else 1)
            self.x = x.unflatten(1, split)
            self.mask = None if mask is None else mask.unflatten(1, split if mask.shape[1] > 1 else (1, 1))
            self.shape = (1, *split, *self.shape[2:])
            self.dims = tuple(range(2, x.dim() + 1))
        # Those of each sample broadcast as they are.
        self.weight, self.bias = (t if t is not None and t.dim() > 1 else self.per_channel(t) for t in (weight, bias))

    def per_channel(self, vector: Tensor | None) -> Tensor | None:
        return None if vector is None else vector.reshape(self.shape)


FAMILIES = {name: NormFamily(partial(run, norm)) for name in ("features", "groups", "channels")}
