"""Gradients for the compiled CPU kernels: each forward with its backward, and a second derivative by the reference.

Inputs are dense already (`choose` saw to dtype, device and mask); a kernel without anything to differentiate is called
directly. On small tensors what Python does takes most of the time, so it is kept to what is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from normwise import reference
from normwise.kernels.channels import channels_backward, channels_forward
from normwise.kernels.groups import groups_backward, groups_forward
from normwise.kernels.rows import rows_backward, rows_forward
from normwise.ops.choose import Call, may_take
from normwise.ops.norm import finished


def rows(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    cols: int,
    eps: float,
    center: bool,
    act: str | None,
) -> tuple[Tensor, Tensor]:
    """(act(norm(s)), s) with s = x + residual (x where there is none), over each run of `cols` elements.

    `weight` and `bias` have `cols` elements, `mask` (bool, True = valid) one a run.
    """
    if not _differentiates(x, residual, weight, bias):
        y, s, _ = rows_forward(x, cols, weight, bias, eps, center=center, act=act, residual=residual, mask=mask)
        return y, s
    out = _Rows.apply(x, residual, weight, bias, mask, (cols, eps, center, act))
    return (out, x) if residual is None else out


def groups(call: Call, groups: int, eps: float, act: str | None) -> tuple[Tensor, Tensor]:
    """(act(GroupNorm of (N, C, ...) + residual), stats (2, N * groups): mean and 1 / sqrt(var + eps) in float64)."""
    x, residual, mask = dense(call.x), call.residual, mask_of_positions(call)
    weight, bias = call.weight, call.bias
    if not _differentiates(x, residual, weight, bias):
        return groups_forward(x, groups, weight, bias, eps, act=act, residual=residual, mask=mask)
    return _Groups.apply(x, residual, weight, bias, mask, (groups, eps, act))  # type: ignore[no-any-return]


def dense(x: Tensor) -> Tensor:
    """(N, C, ...) in a layout that the kernels walk through, channels-first or channels-last, copied if need be."""
    return x if x.is_contiguous() or x.movedim(1, -1).is_contiguous() else x.contiguous()


def mask_of_positions(call: Call) -> Tensor | None:
    """The mask of (N, C, ...), which is that of all channels, with an element for each sample and position."""
    if call.mask is None:
        return None
    samples, _, *positions = call.x.shape
    return call.mask.expand(samples, 1, *positions).contiguous()


def channels(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    averages: tuple[Tensor, Tensor] | None,
    mask: Tensor | None,
    batch_statistics: bool,
    momentum: float,
    eps: float,
    act: str | None,
) -> tuple[Tensor, bool]:
    """act(BatchNorm of (N, C, ...) + residual), contiguous or channels-last, and whether running averages moved."""
    if not _differentiates(x, residual, weight, bias):
        mean, var = averages or (None, None)
        y, _, moved = channels_forward(
            x, mean, var, weight, bias, batch_statistics, momentum, eps, act=act, residual=residual, mask=mask
        )
        return y, moved
    settings = batch_statistics, momentum, eps, act
    return _Channels.apply(x, residual, weight, bias, averages, mask, settings)  # type: ignore[no-any-return]


def _differentiates(*tensors: Tensor | None) -> bool:
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


# Everything that a backward reads goes through `save_for_backward`, and nothing else does: then a tensor may be changed
# in place, packed by hooks and freed as with torch.nn. The values of a bias count only where an activation follows.


def kind(bias: Tensor | None) -> tuple[torch.Size, torch.dtype] | None:
    """What a backward has to know of a bias that is not saved."""
    return None if bias is None else (bias.shape, bias.dtype)


def stand_in(kind: tuple[torch.Size, torch.dtype] | None, x: Tensor) -> Tensor | None:
    """For a bias that was not saved: of its `kind`, with no values."""
    return None if kind is None else x.new_empty(kind[0], dtype=kind[1])


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        mask: Tensor | None,
        settings: tuple[int, float, bool, str | None],
    ) -> Any:
        cols, eps, center, act = settings
        y, s, stats = rows_forward(x, cols, weight, bias, eps, center=center, act=act, residual=residual, mask=mask)
        ctx.save_for_backward(s, weight, bias if act is not None else None, mask, stats)
        ctx.settings, ctx.bias = settings, kind(bias)
        if residual is None:
            return y
        ctx.set_materialize_grads(False)
        return y, s

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dsum: Tensor | None = None) -> Any:
        s, weight, bias, mask, stats = saved = ctx.saved_tensors
        cols, _, center, act = ctx.settings
        if act is None:
            bias = stand_in(ctx.bias, s)
        if dy is None:
            dy = torch.zeros_like(s)
        if may_take(dy, dsum, *saved):
            ds, dweight, dbias = rows_backward(
                dy, s, stats, cols, weight, bias, center=center, act=act, mask=mask, dsum=dsum
            )
        else:
            ds, dweight, dbias = rows_gradients(dy, s, weight, bias, mask, dsum, ctx.settings)
        dresidual = ds if ctx.needs_input_grad[1] else None
        return ds, dresidual, shaped_as(dweight, weight), shaped_as(dbias, bias), None, None


class _Groups(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        mask: Tensor | None,
        settings: tuple[int, float, str | None],
    ) -> tuple[Tensor, Tensor]:
        groups, eps, act = settings
        y, stats = groups_forward(x, groups, weight, bias, eps, act=act, residual=residual, mask=mask)
        # Residual and bias are needed again only to know where the activation was flat.
        needed = (residual, bias) if act is not None else (None, None)
        ctx.save_for_backward(x, weight, *needed, mask, stats)
        ctx.mark_non_differentiable(stats)
        ctx.settings, ctx.bias = settings, kind(bias)
        return y, stats

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: None) -> Any:
        x, weight, residual, bias, mask, stats = saved = ctx.saved_tensors
        groups, eps, act = ctx.settings
        if act is None:
            bias = stand_in(ctx.bias, x)
        wants_residual = ctx.needs_input_grad[1]
        dresidual: Tensor | None
        if not may_take(dy, *saved):
            grouped = (x.shape[0], groups, x.shape[1] // groups, -1)
            gain, shift = (None if t is None else t.reshape(1, groups, -1, 1) for t in (weight, bias))
            upstream, wide, added = (None if t is None else t.reshape(grouped) for t in (dy, x, residual))
            assert upstream is not None
            assert wide is not None
            options = {"mask": None if mask is None else mask.reshape(x.shape[0], 1, 1, -1), "eps": eps, "center": True}
            dx, dweight, dbias, dz = _differentiable(upstream, wide, (2, 3), gain, shift, options, act, added)
            dx, dresidual = dx.reshape(x.shape), dz.reshape(x.shape)
        else:
            dx, dweight, dbias, dresidual = groups_backward(
                dy, x, stats, groups, weight, bias, act=act, residual=residual, mask=mask
            )
            if residual is None and wants_residual:
                dresidual = _passed(dy, x, mask)
        return dx, dresidual if wants_residual else None, shaped_as(dweight, weight), shaped_as(dbias, bias), None, None


class _Channels(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        averages: tuple[Tensor, Tensor] | None,
        mask: Tensor | None,
        settings: tuple[bool, float, float, str | None],
    ) -> tuple[Tensor, bool]:
        batch_statistics, momentum, eps, act = settings
        mean, var = averages or (None, None)
        y, stats, moved = channels_forward(
            x, mean, var, weight, bias, batch_statistics, momentum, eps, act=act, residual=residual, mask=mask
        )
        # Residual and bias are needed again only to know where the activation was flat.
        needed = (residual, bias) if act is not None else (None, None)
        ctx.save_for_backward(x, weight, *needed, mask, stats)
        ctx.settings, ctx.bias = settings, kind(bias)
        return y, moved

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: None) -> Any:
        x, weight, residual, bias, mask, stats = saved = ctx.saved_tensors
        batch_statistics, _, _, act = ctx.settings
        if act is None:
            bias = stand_in(ctx.bias, x)
        wants_residual = ctx.needs_input_grad[1]
        if not may_take(dy, *saved):
            dx, dweight, dbias, dz = channels_gradients(dy, x, stats, weight, bias, mask, residual, ctx.settings)
            return (
                dx,
                dz if wants_residual else None,
                shaped_as(dweight, weight),
                shaped_as(dbias, bias),
                None,
                None,
                None,
            )
        dx, dweight, dbias, dresidual = channels_backward(
            dy, x, stats, weight, bias, batch_statistics, act=act, residual=residual, mask=mask
        )
        if residual is None and wants_residual:
            dresidual = _passed(dy, x, mask)
        return (
            dx,
            dresidual if wants_residual else None,
            shaped_as(dweight, weight),
            shaped_as(dbias, bias),
            None,
            None,
            None,
        )


def rows_gradients(
    dy: Tensor,
    s: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    dsum: Tensor | None,
    settings: tuple[int, float, bool, str | None],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(ds, dweight, dbias) of `rows` in operations that autograd can differentiate again."""
    cols, eps, center, act = settings
    wide = s.reshape(-1, cols)
    valid = None if mask is None else mask.reshape(-1, 1)
    options = {"mask": valid, "eps": eps, "center": center}
    gain, shift = (None if t is None else t.reshape(1, cols) for t in (weight, bias))
    ds, dweight, dbias, _ = _differentiable(dy.reshape(wide.shape), wide, (1,), gain, shift, options, act, None)
    ds = ds.view_as(s)
    if dsum is not None:
        ds = ds + (dsum if valid is None else dsum.reshape(wide.shape).masked_fill(~valid, 0).view_as(s))
    return ds, dweight, dbias


def channels_gradients(
    dy: Tensor,
    x: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    residual: Tensor | None,
    settings: tuple[bool, float, float, str | None],
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """(dx, dweight, dbias, dresidual) of `channels` in operations that autograd can differentiate again."""
    batch_statistics, _, eps, act = settings
    per_channel = (1, -1) + (1,) * (x.dim() - 2)
    gain, shift = (None if t is None else t.reshape(per_channel) for t in (weight, bias))
    valid = None if mask is None else mask.reshape(x.shape[0], 1, *x.shape[2:])
    options: dict[str, Any] = {"mask": valid, "eps": eps, "center": True}
    if not batch_statistics:
        mean, rstd = (t.reshape(per_channel).to(torch.float64) for t in stats)
        options |= {"mean": mean, "var": rstd.pow(-2) - eps}
    dims = (0, *range(2, x.dim()))
    return _differentiable(dy, x, dims, gain, shift, options, act, residual)


def _passed(dy: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
    """The gradient of a residual that no activation follows."""
    return dy if mask is None else dy.masked_fill(~mask.reshape(x.shape[0], 1, *x.shape[2:]), 0)


def _differentiable(
    dy: Tensor,
    x: Tensor,
    dims: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    options: dict[str, Any],
    act: str | None,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """(dx, dweight, dbias, dresidual) in operations that autograd can differentiate again."""
    mask = options["mask"]
    if mask is not None:
        dy = dy.masked_fill(~mask, 0)
    if act is not None:
        z, _ = reference.norm(x, dims, weight, bias, **options)
        dy = _through(reference.activation(act), finished(z, residual, None, mask), dy)
    dx, dweight, dbias = reference.norm_backward(dy, x, dims, weight, bias, **options)
    return dx, dweight, dbias, dy


def _through(act: Callable[[Tensor], Tensor], z: Tensor, dy: Tensor) -> Tensor:
    """The gradient at `z` of act(z), differentiable in both arguments."""
    at = z if z.requires_grad else z.detach().requires_grad_()
    with torch.enable_grad():  # off where no gradient of this gradient is asked for
        (slope,) = torch.autograd.grad(act(at).sum(), at, create_graph=z.requires_grad)
    return slope * dy


def shaped_as(grad: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    """A gain's or bias's gradient in its own dtype and shape."""
    if grad is None or parameter is None:
        return None
    if grad.dtype == parameter.dtype and grad.shape == parameter.shape:
        return grad
    return grad.to(parameter.dtype).reshape(parameter.shape)
