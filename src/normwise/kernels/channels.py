"""BatchNorm by the compiled CPU kernels: statistics of a channel over batch and positions.

Tensors in, tensors out: check, allocate, call. csrc/include/normwise.h is the contract.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from normwise.kernels.arguments import (
    ACTS,
    CHANNELS_FIRST,
    CHANNELS_LAST,
    DTYPES,
    at,
    check_running,
    dense,
    like,
    mask_bytes,
    sizes,
    statistics,
    vector,
    wide,
)
from normwise.kernels.library import kernel
from normwise.kernels.structs import CHANNELS_BACKWARD, CHANNELS_FORWARD, packer

_FORWARD, _BACKWARD = packer(CHANNELS_FORWARD), packer(CHANNELS_BACKWARD)
STRUCTS = (_FORWARD, _BACKWARD)
# The same for plain calls: float32 and no activation are 0, as are null pointers to what such a call has not.
_PLAIN_FORWARD = struct.Struct("@P16x8P3q2d4x2i4xi4x")
_PLAIN_BACKWARD = struct.Struct("@2P16xP8x3P8x2P3q4x2i4xi4x")
PLAIN_STRUCTS = (_PLAIN_FORWARD, _PLAIN_BACKWARD)

_empty_like, _threads, _float64 = torch.empty_like, torch.get_num_threads, torch.float64

_forward = kernel("nw_channels_forward")
_backward = kernel("nw_channels_backward")


def channels_forward(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    *,
    act: str | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, bool]:
    """BatchNorm of (N, C, ...): (y, stats, moved), stats (2, C): mean and rstd used.

    Moves the running averages in training, unless one would become NaN or infinite: then `moved` is False.

    y = act((x - mean) * rstd * weight + bias + residual), in x's memory layout. `mask` (N, positions): bool, True =
    valid. Running averages are float32 (float64 for float64 inputs) and contiguous.
    """
    x, layout = dense(x)
    batch, channels, positions = sizes(x)
    dtype = wide(x)
    weight, bias = vector(weight, dtype, channels), vector(bias, dtype, channels)
    check_running(running_mean, dtype, channels)
    check_running(running_var, dtype, channels)
    if residual is not None:
        residual = like(residual, x)
    mask = mask_bytes(mask, batch * positions)
    y = torch.empty_like(x)
    stats = x.new_empty(2, channels, dtype=torch.float64)
    mean = stats.data_ptr()
    moved = _forward(
        _FORWARD.pack(
            x.data_ptr(),
            at(residual),
            at(mask),
            at(weight),
            at(bias),
            at(running_mean),
            at(running_var),
            y.data_ptr(),
            mean,
            mean + 8 * channels,
            0,
            batch,
            channels,
            positions,
            eps,
            momentum,
            DTYPES[x.dtype],
            layout,
            training,
            ACTS[act],
            torch.get_num_threads(),
        )
    )
    return y, stats, moved


def channels_backward(
    dy: Tensor,
    x: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    *,
    act: str | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dweight, dbias, dresidual)."""
    x, layout = dense(x)
    batch, channels, positions = sizes(x)
    dtype = wide(x)
    weight, bias = vector(weight, dtype, channels), vector(bias, dtype, channels)
    dy = like(dy, x)
    mask = mask_bytes(mask, batch * positions)
    dx = torch.empty_like(x)
    dresidual = None
    if residual is not None:
        residual = like(residual, x)
        dresidual = dy if act is None and mask is None else torch.empty_like(x)
    dweight = None if weight is None else torch.empty_like(weight)
    dbias = None if bias is None else torch.empty_like(bias)
    stats = statistics(stats, channels)
    mean = stats.data_ptr()
    _backward(
        _BACKWARD.pack(
            dy.data_ptr(),
            x.data_ptr(),
            at(residual),
            at(mask),
            at(weight),
            at(bias),
            mean,
            mean + 8 * channels,
            dx.data_ptr(),
            0 if dresidual is dy else at(dresidual),
            at(dweight),
            at(dbias),
            batch,
            channels,
            positions,
            DTYPES[x.dtype],
            layout,
            training,
            ACTS[act],
            torch.get_num_threads(),
        )
    )
    return dx, dweight, dbias, dresidual


def plain_channels_forward(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    tracked: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    sizes: tuple[int, int, int],
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, bool]:
    """(y, stats, moved) of `channels_forward` without residual, mask and activation, where everything is contiguous
    float32 and `sizes` are (batch, channels, positions). `tracked`, an int64, counts the batch if the averages move.

    On small tensors what Python does takes longer than the kernel: nothing is checked here, callers vouch for it.
    """
    batch, channels, positions = sizes
    y = _empty_like(x)
    stats = x.new_empty((2, channels), dtype=_float64)
    mean = stats.data_ptr()
    moved = _forward(
        _PLAIN_FORWARD.pack(
            x.data_ptr(),
            0 if weight is None else weight.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            0 if running_mean is None else running_mean.data_ptr(),
            0 if running_var is None else running_var.data_ptr(),
            y.data_ptr(),
            mean,
            mean + 8 * channels,
            0 if tracked is None else tracked.data_ptr(),
            batch,
            channels,
            positions,
            eps,
            momentum,
            CHANNELS_LAST if positions == 1 else CHANNELS_FIRST,
            training,
            _threads(),
        )
    )
    return y, stats, moved


def plain_channels_backward(
    dy: Tensor,
    x: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    has_bias: bool,
    sizes: tuple[int, int, int],
    training: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(dx, dweight, dbias) of `plain_channels_forward`, with `dy` contiguous float32 too, a bias only with a gain."""
    batch, channels, positions = sizes
    dx = _empty_like(x)
    dweight = None if weight is None else _empty_like(weight)
    dbias = _empty_like(weight) if weight is not None and has_bias else None
    mean = stats.data_ptr()
    _backward(
        _PLAIN_BACKWARD.pack(
            dy.data_ptr(),
            x.data_ptr(),
            0 if weight is None else weight.data_ptr(),
            mean,
            mean + 8 * channels,
            dx.data_ptr(),
            0 if dweight is None else dweight.data_ptr(),
            0 if dbias is None else dbias.data_ptr(),
            batch,
            channels,
            positions,
            CHANNELS_LAST if positions == 1 else CHANNELS_FIRST,
            training,
            _threads(),
        )
    )
    return dx, dweight, dbias
