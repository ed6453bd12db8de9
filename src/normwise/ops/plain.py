"""Plain calls of the norms: an input, a gain and a bias, float32 on the CPU, and nothing else.

They are the most frequent calls, and may be short. On a few thousand elements what Python does takes longer than a
kernel: what must be known is asked once, and a call that leaves any question open is left to the full path, which
answers it, or says what does not fit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from normwise.kernels import cpu
from normwise.kernels.arguments import readable
from normwise.kernels.channels import plain_channels_backward, plain_channels_forward
from normwise.kernels.rows import plain_rows_backward, plain_rows_forward
from normwise.ops import compiled
from normwise.ops.choose import SHORT_ROW, SMALL, compiles_plain, loses_digits, may_take, plain


def layer_norm(
    x: Any, normalized_shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor | None:
    """`functional.layer_norm` of a plain call; None where it takes more to say what is right, or wrong."""
    if not plain(x) or not eps > 0 or not readable(weight, bias):
        return None
    if x.numel() <= SMALL and _grad_enabled() and cpu.available():
        try:
            if normalized_shape[-1] <= SHORT_ROW:
                y, mean, rstd = torch.native_layer_norm(x, normalized_shape, weight, bias, eps)
                return None if loses_digits(mean, rstd) else y
        except (RuntimeError, TypeError, IndexError):
            return None  # the full path says what does not fit
    return _by_rows(x, normalized_shape, weight, bias, eps, center=True)


def rms_norm(x: Any, normalized_shape: Sequence[int], weight: Tensor | None, eps: float) -> Tensor | None:
    """`functional.rms_norm` of a plain call; None as in `layer_norm`."""
    return _by_rows(x, normalized_shape, weight, None, eps, center=False) if plain(x) and eps > 0 else None


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | Tensor,
    eps: float,
    tracked: Tensor | None = None,
) -> tuple[Tensor, bool] | None:
    """`functional.batch_norm` of an input that is `choose.plain`, and whether running averages moved; None, and nothing
    moved, as in `layer_norm`. `tracked` counts the batches whose averages moved."""
    if not compiles_plain(x) or not eps > 0 or type(momentum) is not float or not 0 <= momentum <= 1:
        return None
    shape = x.shape
    axes = len(shape)
    if axes < 2:
        return None
    batch, channels = shape[0], shape[1]
    positions = 1 if axes == 2 else math.prod(shape[2:])
    if training:
        if batch * positions < 2 or (running_mean is None) is not (running_var is None):
            return None
        if tracked is not None and not (tracked.dtype is torch.int64 and readable(tracked)):
            return None
    elif running_mean is None or running_var is None:
        return None
    if not _read_by_kernels((running_mean, running_var, weight, bias), (channels,)) or (
        weight is None and bias is not None
    ):
        return None
    settings = ((batch, channels, positions), training, momentum, eps)
    if _grad_enabled() and (
        x.requires_grad or (weight is not None and weight.requires_grad) or (bias is not None and bias.requires_grad)
    ):
        return _Channels.apply(x, running_mean, running_var, tracked, weight, bias, settings)  # type: ignore[no-any-return]
    y, _, moved = plain_channels_forward(x, running_mean, running_var, tracked, weight, bias, *settings)
    return y, moved


def _by_rows(
    x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float, center: bool
) -> Tensor | None:
    shape = tuple(normalized_shape)
    if not shape or x.shape[-len(shape) :] != shape or not compiles_plain(x):
        return None
    if not _read_by_kernels((weight, bias), shape) or (weight is None and bias is not None):
        return None
    cols = math.prod(shape)
    rows = x.numel() // cols
    if _grad_enabled() and (
        x.requires_grad or (weight is not None and weight.requires_grad) or (bias is not None and bias.requires_grad)
    ):
        return _Rows.apply(x, weight, bias, (rows, cols, eps, center))  # type: ignore[no-any-return]
    return plain_rows_forward(x, weight, bias, rows, cols, eps, center, False)[0]


def _read_by_kernels(tensors: tuple[Tensor | None, ...], shape: tuple[int, ...]) -> bool:
    """Whether the plain kernels read these gains, biases and running averages as they lie in memory."""
    for t in tensors:
        if t is not None and (t.dtype is not _float32 or t.shape != shape or not t.is_contiguous()):
            return False
    return readable(*tensors)


def _as_saved(x: Tensor, weight: Tensor | None, stats: Tensor) -> bool:
    """Whether these are as the forward saved them: a hook on saved tensors may give back other dtypes and layouts."""
    return (
        x.dtype is _float32
        and x.is_contiguous()
        and stats.dtype is _float64
        and stats.is_contiguous()
        and (weight is None or (weight.dtype is _float32 and weight.is_contiguous()))
    )


_float64 = torch.float64
_float32, _grad_enabled = torch.float32, torch.is_grad_enabled


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, settings: tuple[int, int, float, bool]
    ) -> Tensor:
        y, stats = plain_rows_forward(x, weight, bias, *settings, True)
        ctx.save_for_backward(x, weight, stats)
        ctx.settings = bias is not None, settings
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, stats = ctx.saved_tensors
        has_bias, (rows, cols, eps, center) = ctx.settings
        if may_take(dy, x, weight, stats) and _as_saved(x, weight, stats):
            if not dy.is_contiguous():
                dy = torch.empty_like(x).copy_(dy)
            return *plain_rows_backward(dy, x, stats, weight, has_bias, rows, cols, center), None
        shift = weight if has_bias else None  # only whether there is one counts
        dx, dweight, dbias = compiled.rows_gradients(dy, x, weight, shift, None, None, (cols, eps, center, None))
        return dx, compiled.shaped_as(dweight, weight), compiled.shaped_as(dbias, shift), None


class _Channels(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        tracked: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        settings: tuple[tuple[int, int, int], bool, float, float],
    ) -> tuple[Tensor, bool]:
        y, stats, moved = plain_channels_forward(x, running_mean, running_var, tracked, weight, bias, *settings)
        ctx.save_for_backward(x, weight, stats)
        ctx.settings = bias is not None, settings
        return y, moved

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: None) -> Any:
        x, weight, stats = ctx.saved_tensors
        has_bias, (sizes, training, momentum, eps) = ctx.settings
        if may_take(dy, x, weight, stats) and _as_saved(x, weight, stats):
            if not dy.is_contiguous():
                dy = torch.empty_like(x).copy_(dy)
            dx, dweight, dbias = plain_channels_backward(dy, x, stats, weight, has_bias, sizes, training)
            return dx, None, None, None, dweight, dbias, None
        shift = weight if has_bias else None
        settings = (training, momentum, eps, None)
        found = compiled.channels_gradients(dy, x, stats, weight, shift, None, None, settings)
        dx, dweight, dbias = found[:3]
        return dx, None, None, None, compiled.shaped_as(dweight, weight), compiled.shaped_as(dbias, shift), None
