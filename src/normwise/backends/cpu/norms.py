"""Norms by the C++ kernels: from the tensors of a request to the structs of csrc/include/normwise.h, and back.

On small tensors what Python does takes longer than a kernel, so that here little is done twice or asked twice.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from normwise.backends.cpu import library, structs
from normwise.backends.cpu.memory import (
    ACTS,
    CHANNELS_LAST,
    DTYPES,
    GATE_ACTS,
    address,
    dense,
    laid_out_like,
    mask_bytes,
    of_parameter,
    parameter_dtype,
    statistics,
    vector,
)
from normwise.backends.gains import gain_obstacle
from normwise.backends.protocol import (
    Gate,
    Moments,
    NormConfig,
    NormFamily,
    NormGradients,
    NormRequest,
    NormResult,
    accumulation_dtype,
)

ROWS_FORWARD, ROWS_BACKWARD, GROUPS_FORWARD, GROUPS_BACKWARD, CHANNELS_FORWARD, CHANNELS_BACKWARD = STRUCTS = tuple(
    map(
        structs.packer,
        (
            structs.ROWS_FORWARD,
            structs.ROWS_BACKWARD,
            structs.GROUPS_FORWARD,
            structs.GROUPS_BACKWARD,
            structs.CHANNELS_FORWARD,
            structs.CHANNELS_BACKWARD,
        ),
    )
)

_empty_like, _empty, _float64, _threads = torch.empty_like, torch.empty, torch.float64, torch.get_num_threads


def supports(request: NormRequest) -> str | None:
    """What the kernels cannot do; that there are no kernels here is the last reason to be named."""
    config, x, residual, weight, bias, mask, running_mean, running_var, _ = request
    if x.dtype not in DTYPES:
        return f"the C++ kernels take float32, bfloat16 and float64, not {x.dtype}"
    if x.numel() == 0 and 0 in (x.shape[x.dim() - config.axes :] if config.family == "features" else x.shape[1:2]):
        return "the C++ kernels take no input without a feature"
    if residual is not None and residual.dtype is not x.dtype:
        return f"the C++ kernels do not mix an input of {x.dtype} with a residual of {residual.dtype}"
    if config.family == "features" and (
        (weight is not None and weight.dim() != config.axes) or (bias is not None and bias.dim() != config.axes)
    ):
        reason = gain_obstacle("the C++ kernels", config, x, weight, bias)
        if reason is not None:
            return reason
    if config.family == "channels" and (
        (weight is not None and weight.dim() > 1) or (bias is not None and bias.dim() > 1)
    ):
        reason = _sample_gain_obstacle(x, weight, bias)
        if reason is not None:
            return reason
    if mask is not None:
        together = range(x.dim() - config.axes, x.dim()) if config.family == "features" else (1,)
        if any(mask.shape[d] != 1 for d in together):
            what = "features of a row" if config.family == "features" else "channels"
            return f"the C++ kernels take one mask for all {what}"
    if running_mean is not None and config.family == "channels":
        # Those of InstanceNorm, the other norm that has them, move by what the kernel says of each sample.
        statistics = accumulation_dtype(x.dtype)
        for average in (running_mean, running_var):
            if average is not None and (average.dtype is not statistics or not average.is_contiguous()):
                return f"the C++ kernels keep contiguous running averages of {statistics} beside {x.dtype}"
        if config.momentum is None or isinstance(config.momentum, Tensor):
            return "the C++ kernels take momentum as a number only"
    return library.missing()


def supports_gate(config: NormConfig, x: Tensor, gate: Gate) -> str | None:
    """What the kernels cannot do with a gate of a request that they support without it."""
    if gate.values.dtype is not x.dtype:
        return f"the C++ kernels do not mix an input of {x.dtype} with a gate of {gate.values.dtype}"
    if config.act is not None and not gate.first:
        return "the C++ kernels take no activation behind a gate that comes last"
    return None


def _sample_gain_obstacle(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> str | None:
    """What keeps the kernels from a gain and bias of each sample of (N, C, ...)."""
    full = (*x.shape[:2], *(1,) * (x.dim() - 2))
    if not x.numel() or any(t is not None and t.shape != full for t in (weight, bias)):
        return "the C++ kernels take a gain and bias of all samples, or of each: one for each sample and channel"
    return None


def _channel_gains(weight: Tensor | None, bias: Tensor | None, batch: int, channels: int) -> tuple[int, int]:
    """How many elements a gain or bias has, and how many neighbouring samples share one of its rows."""
    given = bias if weight is None else weight
    if given is None or given.dim() == 1:
        return channels, batch or 1
    return given.numel(), batch * channels // given.numel()


def features_forward(
    config: NormConfig,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    _mean: Tensor | None,
    _var: Tensor | None,
    _tracked: Tensor | None,
    needs_grad: bool,
    gate: Gate | None = None,
) -> NormResult:
    """LayerNorm and RMSNorm of the last `config.axes` axes, by a gain and bias of all rows or of neighbouring ones."""
    x = x.contiguous()
    cols = x.shape[-1] if config.axes == 1 else prod(x.shape[x.dim() - config.axes :])
    rows = x.numel() // cols
    dtype = x.dtype
    wide = parameter_dtype(dtype)
    group_rows, size = rows or 1, cols
    given = bias if weight is None else weight
    if given is not None and given.dim() != config.axes:
        size = given.numel()
        group_rows = rows * cols // size
    gain, shift = vector(weight, wide, size), vector(bias, wide, size)
    opened = None if gate is None else laid_out_like(gate.values, x)
    total = x
    if residual is not None:
        residual, total = laid_out_like(residual, x), _empty_like(x)
    if mask is not None:
        mask = _of_rows(config, mask, x)
    y = _empty_like(x)
    stats = _empty((2, rows), dtype=_float64, device="cpu") if needs_grad else None
    at_stats = 0 if stats is None else stats.data_ptr()
    status = library.functions.nw_rows_forward(
        ROWS_FORWARD.pack(
            x.data_ptr(),
            address(residual),
            address(mask),
            address(gain),
            address(shift),
            address(opened),
            total.data_ptr(),
            y.data_ptr(),
            at_stats,
            at_stats + 8 * rows if needs_grad else 0,
            rows,
            cols,
            group_rows,
            config.eps,
            DTYPES[dtype],
            config.center,
            ACTS[config.act],
            _threads(),
            0 if gate is None else GATE_ACTS[gate.act],
            0 if gate is None else gate.first,
        )
    )
    if status:
        library.raise_fault(status)
    return NormResult(y, total, stats)


def features_backward(
    config: NormConfig,
    total: Tensor,
    _residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    stats: Tensor,
    dy: Tensor,
    dtotal: Tensor | None,
    gate: Gate | None = None,
) -> NormGradients:
    total = total.contiguous()
    cols = total.shape[-1] if config.axes == 1 else prod(total.shape[total.dim() - config.axes :])
    rows = total.numel() // cols
    stats = statistics(stats, rows)
    dtype = total.dtype
    wide = parameter_dtype(dtype)
    group_rows, size = rows or 1, cols
    given = bias if weight is None else weight
    if given is not None and given.dim() != config.axes:
        size = given.numel()
        group_rows = rows * cols // size
    gain, shift = vector(weight, wide, size), vector(bias, wide, size)
    opened = None if gate is None else laid_out_like(gate.values, total)
    dy = laid_out_like(dy, total)
    if dtotal is not None:
        dtotal = laid_out_like(dtotal, total)
    if mask is not None:
        mask = _of_rows(config, mask, total)
    dx = _empty_like(total)
    dweight, dbias = (None if t is None else _empty_like(t) for t in (gain, shift))
    dgate = None if opened is None else _empty_like(total)
    at_stats = stats.data_ptr()
    status = library.functions.nw_rows_backward(
        ROWS_BACKWARD.pack(
            dy.data_ptr(),
            address(dtotal),
            total.data_ptr(),
            address(mask),
            address(gain),
            address(shift),
            address(opened),
            at_stats,
            at_stats + 8 * rows,
            dx.data_ptr(),
            address(dweight),
            address(dbias),
            address(dgate),
            rows,
            cols,
            group_rows,
            DTYPES[dtype],
            config.center,
            ACTS[config.act],
            _threads(),
            0 if gate is None else GATE_ACTS[gate.act],
            0 if gate is None else gate.first,
        )
    )
    if status:
        library.raise_fault(status)
    return NormGradients(dx, dx, of_parameter(dweight, weight), of_parameter(dbias, bias), dgate)


def groups_forward(
    config: NormConfig,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    running_mean: Tensor | None,
    _var: Tensor | None,
    _tracked: Tensor | None,
    _needs_grad: bool,
) -> NormResult:
    """GroupNorm, and InstanceNorm with a group for each channel."""
    x, layout, batch, channels, positions = _channels_of(x)
    dtype = x.dtype
    wide = parameter_dtype(dtype)
    gain, shift = vector(weight, wide, channels), vector(bias, wide, channels)
    if residual is not None:
        residual = laid_out_like(residual, x)
    if mask is not None:
        mask = _of_positions(mask, x)
    y = _empty_like(x)
    count = batch * config.groups
    stats = _empty((2, count), dtype=_float64, device="cpu")
    at_stats = stats.data_ptr()
    status = library.functions.nw_groups_forward(
        GROUPS_FORWARD.pack(
            x.data_ptr(),
            address(residual),
            address(mask),
            address(gain),
            address(shift),
            y.data_ptr(),
            at_stats,
            at_stats + 8 * count,
            batch,
            channels,
            positions,
            config.groups,
            config.eps,
            DTYPES[dtype],
            layout,
            ACTS[config.act],
            _threads(),
        )
    )
    if status:
        library.raise_fault(status)
    if running_mean is None:
        return NormResult(y, x, stats)
    return NormResult(y, x, stats, None, _moments(stats, x, mask, config))


def _moments(stats: Tensor, x: Tensor, mask: Tensor | None, config: NormConfig) -> Moments:
    """Those of each sample and group: what running averages are moved by."""
    samples = x.shape[0]
    mean, rstd = stats.view(2, samples, config.groups)
    elements = x.numel() // (samples * config.groups)
    if mask is None:
        count = torch.full((1, 1), elements, dtype=_float64, device="cpu")
    else:
        valid = mask.view(samples, -1)
        count = valid.sum(1, keepdim=True).double() * (elements // valid.shape[1])
    return Moments(mean, (rstd.pow(-2) - config.eps).clamp(min=0), count.expand(samples, config.groups))


def groups_backward(
    config: NormConfig,
    total: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    stats: Tensor,
    dy: Tensor,
    _dtotal: Tensor | None,
) -> NormGradients:
    x, layout, batch, channels, positions = _channels_of(total)
    dtype = x.dtype
    wide = parameter_dtype(dtype)
    gain, shift = vector(weight, wide, channels), vector(bias, wide, channels)
    dy = laid_out_like(dy, x)
    dresidual = None
    if residual is not None:
        residual, dresidual = laid_out_like(residual, x), _empty_like(x)
    if mask is not None:
        mask = _of_positions(mask, x)
    dx = _empty_like(x)
    dweight, dbias = (None if t is None else _empty_like(t) for t in (gain, shift))
    stats = statistics(stats, batch * config.groups)
    at_stats = stats.data_ptr()
    status = library.functions.nw_groups_backward(
        GROUPS_BACKWARD.pack(
            dy.data_ptr(),
            x.data_ptr(),
            address(residual),
            address(mask),
            address(gain),
            address(shift),
            at_stats,
            at_stats + 8 * stats.shape[1],
            dx.data_ptr(),
            address(dresidual),
            address(dweight),
            address(dbias),
            batch,
            channels,
            positions,
            config.groups,
            DTYPES[dtype],
            layout,
            ACTS[config.act],
            _threads(),
        )
    )
    if status:
        library.raise_fault(status)
    return NormGradients(dx, dresidual, of_parameter(dweight, weight), of_parameter(dbias, bias))


def channels_forward(
    config: NormConfig,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    _needs_grad: bool,
) -> NormResult:
    """BatchNorm, by a gain and bias of all samples or of each. Running averages are updated in the kernel, unless one
    would become NaN or infinite."""
    x, layout, batch, channels, positions = _channels_of(x)
    dtype = x.dtype
    wide = parameter_dtype(dtype)
    size, group_samples = _channel_gains(weight, bias, batch, channels)
    gain, shift = vector(weight, wide, size), vector(bias, wide, size)
    if residual is not None:
        residual = laid_out_like(residual, x)
    if mask is not None:
        mask = _of_positions(mask, x)
    y = _empty_like(x)
    stats = _empty((2, channels), dtype=_float64, device="cpu")
    at_stats = stats.data_ptr()
    status = library.functions.nw_channels_forward(
        CHANNELS_FORWARD.pack(
            x.data_ptr(),
            address(residual),
            address(mask),
            address(gain),
            address(shift),
            address(running_mean),
            address(running_var),
            y.data_ptr(),
            at_stats,
            at_stats + 8 * channels,
            address(num_batches_tracked),
            batch,
            channels,
            positions,
            group_samples,
            config.eps,
            config.momentum,
            DTYPES[dtype],
            layout,
            config.batch_statistics,
            ACTS[config.act],
            _threads(),
        )
    )
    if status and status != library.STATS_NOT_UPDATED:
        library.raise_fault(status)
    return NormResult(y, x, stats, not status)


def channels_backward(
    config: NormConfig,
    total: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    stats: Tensor,
    dy: Tensor,
    _dtotal: Tensor | None,
) -> NormGradients:
    x, layout, batch, channels, positions = _channels_of(total)
    dtype = x.dtype
    wide = parameter_dtype(dtype)
    size, group_samples = _channel_gains(weight, bias, batch, channels)
    gain, shift = vector(weight, wide, size), vector(bias, wide, size)
    dy = laid_out_like(dy, x)
    dresidual = None
    if residual is not None:
        residual, dresidual = laid_out_like(residual, x), _empty_like(x)
    if mask is not None:
        mask = _of_positions(mask, x)
    dx = _empty_like(x)
    dweight, dbias = (None if t is None else _empty_like(t) for t in (gain, shift))
    stats = statistics(stats, channels)
    at_stats = stats.data_ptr()
    status = library.functions.nw_channels_backward(
        CHANNELS_BACKWARD.pack(
            dy.data_ptr(),
            x.data_ptr(),
            address(residual),
            address(mask),
            address(gain),
            address(shift),
            at_stats,
            at_stats + 8 * channels,
            dx.data_ptr(),
            address(dresidual),
            address(dweight),
            address(dbias),
            batch,
            channels,
            positions,
            group_samples,
            DTYPES[dtype],
            layout,
            config.batch_statistics,
            ACTS[config.act],
            _threads(),
        )
    )
    if status:
        library.raise_fault(status)
    return NormGradients(dx, dresidual, of_parameter(dweight, weight), of_parameter(dbias, bias))


def _channels_of(x: Tensor) -> tuple[Tensor, int, int, int, int]:
    """(x dense, its layout, batch, channels, positions) of (N, C, ...)."""
    shape = x.shape
    if len(shape) == 2:
        return x.contiguous(), CHANNELS_LAST, shape[0], shape[1], 1
    x, layout = dense(x)
    return x, layout, shape[0], shape[1], prod(shape[2:])


def _of_rows(config: NormConfig, mask: Tensor, x: Tensor) -> Tensor:
    """A mask of whole rows as one byte a row."""
    rows = x.shape[: x.dim() - config.axes]
    return mask_bytes(mask, (*rows, *(1,) * config.axes))


def _of_positions(mask: Tensor, x: Tensor) -> Tensor:
    """The mask of all channels of (N, C, ...) as one byte a sample and position."""
    return mask_bytes(mask, (x.shape[0], 1, *x.shape[2:]))


FAMILIES = {
    "features": NormFamily(features_forward, features_backward, supports_gate),
    "groups": NormFamily(groups_forward, groups_backward),
    "channels": NormFamily(channels_forward, channels_backward),
}
