"""Norms by ATen's own kernels, whose gradients autograd knows."""

from __future__ import annotations

import torch
from torch import Tensor

from normwise.backends._torch_internals import batch_norm_with_stats
from normwise.backends.activations import add_residual_and_activate, channels_laid_out_like
from normwise.backends.aten import masked
from normwise.backends.devices import on_cpu
from normwise.backends.protocol import NormConfig, NormFamily, NormRequest, NormResult, accumulation_dtype, momentum_now

# ATen scales by x * a + b, where a = weight * rstd and b = bias - mean * a nearly cancel when the mean is much larger
# than the deviation: its error is about 1e-7 times this ratio. Up to 32 that stays within a few float32 roundings.
MEAN_TO_DEVIATION_LIMIT = 32.0

# ATen's BatchNorm on rows of channels, (N, C) or channels-last, adds up each channel in one float32 variable per
# thread; up to this many elements the error of that sum stays within a few float32 roundings.
RUNNING_SUM_LIMIT = 1 << 14

# Statistics that ATen squares and sums in float32 stay finite, and the running variance representable, for deviations
# up to this one.
LARGEST_DEVIATION = 1e18


def supports(request: NormRequest) -> str | None:
    """What ATen's kernels cannot do."""
    config, x, _, weight, bias, mask, running_mean, _, _ = request
    features = config.family == "features"
    if features and any(t is not None and t.dim() != config.axes for t in (weight, bias)):
        return "ATen's kernels take one gain and bias for all rows"
    if mask is not None and not features:
        if on_cpu(x) or x.numel() == 0 or torch.compiler.is_compiling():
            return "ATen's kernels take no mask"
    elif mask is not None and not (features and all(mask.shape[d] == 1 for d in range(x.dim() - config.axes, x.dim()))):
        # A mask of whole rows of features is no obstacle: what comes of masked rows is put back to 0.
        return "ATen's kernels take no mask"
    on_tensor = config.family == "channels" and (not on_cpu(x) or torch.compiler.is_compiling())
    if _of_tensor(config.momentum) and not on_tensor:
        return "ATen takes momentum as a number only"
    if running_mean is not None and config.batch_statistics and x.numel() == x.shape[1]:
        return "ATen moves the running variance to NaN by the deviation of a single value"
    if weight is not None and weight.dtype != x.dtype:
        half = x.dtype in (torch.bfloat16, torch.float16)
        if not half or weight.dtype != torch.float32:
            return f"ATen does not mix an input of {x.dtype} with a gain of {weight.dtype}"
    if config.op == "instance_norm" and x.numel() == 0:
        return "ATen's InstanceNorm fails on an empty input or turns its running averages into NaN"
    return None


def shortcoming(request: NormRequest, may_look: bool) -> str | None:
    """Where ATen would do the job, but less well than promised."""
    config, x, _, _, _, _, running_mean, running_var, _ = request
    if may_look and config.op == "instance_norm" and config.batch_statistics and running_mean is not None:
        return "ATen moves running averages to NaN by a sample that is not finite"
    if _without_features(config, x) or (config.op == "group_norm" and x.numel() == 0):
        return "some of ATen's kernels fail, or give NaN gradients, without an element"
    if running_mean is not None and config.batch_statistics and torch.jit.is_tracing():  # type: ignore[attr-defined]
        # A traced graph is optimized at its second run, and does not know that ATen's kernel writes on the averages.
        return "torch.jit loses what ATen's kernel does to running averages"
    if type(x) not in (Tensor, torch.nn.Parameter) or not on_cpu(x) or x.numel() == 0:
        return None  # another kind of tensor knows ATen's norms, and the formula may be more than it can do
    if may_look and config.op == "rms_norm":
        return "ATen's RMSNorm is these operations too, but makes zeros of an input whose squares overflow"
    if may_look and _long_gain_sums(request):
        return "ATen adds up the gradient of a gain over many elements in one float32 sum, which loses precision"
    if config.family == "channels" and config.batch_statistics and not _is_left_to_compiler():
        rows_of_channels = x.dim() == 2 or not x.is_contiguous()
        if rows_of_channels and x.dtype != torch.float64 and x.numel() // x.shape[1] > RUNNING_SUM_LIMIT:
            return "ATen adds up long columns of channels in one float32 sum, which loses precision"
    if not may_look:
        return None
    with torch.no_grad():
        if not config.batch_statistics:
            assert running_mean is not None
            assert running_var is not None
            mean, deviation = running_mean, (running_var + config.eps).sqrt()
        else:
            rows = _rows_of_statistics(request)
            if rows.shape[-1] == 0:
                return None
            var, mean = torch.var_mean(rows, -1, correction=0)
            deviation = (var + config.eps).sqrt()
        mean, deviation = mean.float(), deviation.float()
        near = (mean.abs() <= MEAN_TO_DEVIATION_LIMIT * deviation) | (not config.center)
        fine = (near & (deviation <= LARGEST_DEVIATION) & (mean.abs() <= LARGEST_DEVIATION)).all()
    return (
        None if bool(fine) else "ATen loses precision where a mean is much larger than the deviation, or is not finite"
    )


def _of_tensor(momentum: float | Tensor | None) -> bool:
    """Whether the weight of a batch is known on the device alone."""
    return momentum is None or isinstance(momentum, Tensor)


def _is_left_to_compiler() -> bool:
    """Whether torch.compile makes loops of its own of ATen's norms, in layouts of its own choice; an exported program
    runs ATen's kernels.

    Inductor's add up in blocks (Welford's formula forward, cascades backward) and keep their precision. Given a node of
    ours instead, which it cannot look into, a compiled MobileNet in channels-last took 1.46 of its time.
    """
    return torch.compiler.is_compiling() and not torch.compiler.is_exporting()


def _without_features(config: NormConfig, x: Tensor) -> bool:
    """Whether an axis of channels, or a normalized axis of LayerNorm and RMSNorm, has size 0."""
    if x.numel():
        return False
    return 0 in (x.shape[x.dim() - config.axes :] if config.family == "features" else x.shape[1:2])


def _long_gain_sums(request: NormRequest) -> bool:
    """Whether the gradient of the gain is wanted, and a float32 sum over so many elements that it loses precision."""
    x, weight = request.x, request.weight
    if weight is None or not weight.requires_grad or not torch.is_grad_enabled() or x.dtype != torch.float32:
        return False
    return x.numel() // max(weight.numel(), 1) > RUNNING_SUM_LIMIT


def _rows_of_statistics(request: NormRequest) -> Tensor:
    """x with the elements that share statistics in the last axis."""
    config, x = request.config, request.x
    if request.residual is not None and config.family == "features":
        x = x + request.residual
    if config.family == "features":
        return x.flatten(x.dim() - config.axes)
    if config.family == "groups":
        return x.reshape(x.shape[0], config.groups, -1) if x.numel() else x.new_empty(0)
    return x.transpose(0, 1).flatten(1)


def features(
    config: NormConfig,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    *_: object,
) -> NormResult:
    """LayerNorm and RMSNorm; a mask is of whole rows."""
    if residual is not None:
        x = x + residual
    invalid = None if mask is None else ~mask
    if invalid is not None:
        x = x.masked_fill(invalid, 0)
    shape = x.shape[x.dim() - config.axes :]
    # ATen's kernels read gains, biases and averages as if they were contiguous.
    weight, bias = (None if t is None else t.contiguous() for t in (weight, bias))
    if config.center:
        if weight is not None and bias is not None and bias.dtype is not weight.dtype:
            bias = bias.to(weight.dtype)  # the two may differ from the input's dtype, but not from one another's
        y = torch.layer_norm(x, shape, weight, bias, config.eps, torch.backends.cudnn.enabled)
    elif config.as_written or (weight is not None and weight.dtype != x.dtype):
        y = rms_norm_as_written(x, len(shape), weight, config.eps)
    else:
        y = torch.rms_norm(x, shape, weight, config.eps)
    if invalid is not None:
        y = y.masked_fill(invalid, 0)
    return NormResult(add_residual_and_activate(y, None, config.act, mask), x)


def rms_norm_as_written(x: Tensor, axes: int, weight: Tensor | None, eps: float) -> Tensor:
    """RMSNorm of the last `axes` axes as the models of transformers write it: the same bits, forward and backward.

    A mean square beyond its dtype gives NaN, where they make zeros of the input.
    """
    wide = x.to(accumulation_dtype(x.dtype))
    mean_square = wide.pow(2).mean(tuple(range(-axes, 0)), keepdim=True)
    y = wide * (torch.rsqrt(mean_square + eps) + mean_square * 0)
    return (y if weight is None else y * weight).to(x.dtype)


def groups(
    config: NormConfig,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *_: object,
) -> NormResult:
    """GroupNorm and InstanceNorm."""
    cudnn = torch.backends.cudnn.enabled
    weight, bias = (None if t is None else t.contiguous() for t in (weight, bias))
    if config.op == "instance_norm":
        assert config.momentum is not None
        y = torch.instance_norm(
            x, weight, bias, running_mean, running_var, True, float(config.momentum), config.eps, cudnn
        )
    elif (
        x.dim() == 3 and not x.is_contiguous() and x.mT.is_contiguous()
    ):  # channels last, which ATen knows of four axes
        y = torch.group_norm(x.unsqueeze(2), config.groups, weight, bias, config.eps, cudnn).squeeze(2)
    else:
        y = torch.group_norm(x, config.groups, weight, bias, config.eps, cudnn)
    y = add_residual_and_activate(y, residual, config.act, None)
    return NormResult(y if _is_left_to_compiler() else channels_laid_out_like(y, x), x)


def channels(
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
    """BatchNorm; with a mask by given statistics only (see `masked`)."""
    weight, bias = (None if t is None else t.contiguous() for t in (weight, bias))
    mean, var = (None if t is None else t.contiguous() for t in (running_mean, running_var))
    new_running: Tensor | tuple[Tensor, Tensor] | None = None
    batch: Tensor | None = None
    momentum = config.momentum
    if config.batch_statistics and running_mean is not None and running_var is not None:
        # ATen moves copies: what it makes of a batch may not be finite, and it saves them for a backward that does not
        # read them in training, so that moving the averages again before the backward is no error.
        # In the wider dtype of averages and gain (BatchRenorm's): ATen takes no two.
        dtype = running_mean.dtype if weight is None else torch.promote_types(running_mean.dtype, weight.dtype)
        averages = running_mean.detach(), running_var.detach()
        if on_cpu(x) or torch.compiler.is_compiling():
            mean, var = (average.to(dtype, copy=True) for average in averages)
            new_running = mean, var
        else:  # side by side, in fewer launches
            new_running = torch.stack([average.to(dtype) for average in averages])
            mean, var = new_running.unbind(0)
            if _of_tensor(momentum):  # ATen takes a number: 1 gives the batch's own mean and unbiased variance
                batch = torch.zeros_like(new_running)
                mean, var = batch.unbind(0)
    invalid = None if mask is None else ~mask
    if invalid is not None:
        x = x.masked_fill(invalid, 0)
    cudnn = torch.backends.cudnn.enabled
    number = 1.0 if momentum is None or isinstance(momentum, Tensor) else momentum
    y = torch.batch_norm(x, weight, bias, mean, var, config.batch_statistics, number, config.eps, cudnn)
    if batch is not None and isinstance(new_running, Tensor):
        with torch.no_grad():
            weight_of_batch = momentum_now(momentum, num_batches_tracked, new_running.dtype)
            new_running = torch.lerp(new_running, batch, weight_of_batch.to(new_running.dtype))
    elif new_running is not None and _of_tensor(momentum):
        with torch.no_grad():
            weight_of_batch = momentum_now(momentum, num_batches_tracked, running_mean.dtype)  # type: ignore[union-attr]
            means, variances = zip(averages, new_running, strict=True)
            new_running = _lerp(*means, weight_of_batch), _lerp(*variances, weight_of_batch)
    if invalid is not None:
        y = y.masked_fill(invalid, 0)
    y = add_residual_and_activate(y, residual, config.act, mask)
    return NormResult(y, x, None, True if new_running is None else None, None, new_running)


def channels_with_stats(
    config: NormConfig, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, *_: object
) -> NormResult:
    """BatchNorm by the batch's statistics, which ATen computes anyway and `stats` has: no running average is moved."""
    weight, bias = (None if t is None else t.contiguous() for t in (weight, bias))
    cudnn = torch.backends.cudnn.enabled
    y, mean, rstd = batch_norm_with_stats(x, weight, bias, None, None, True, 0.0, config.eps, cudnn)[:3]
    y = add_residual_and_activate(y, residual, config.act, None)
    return NormResult(y, x, (mean, rstd), None)


def _lerp(old: Tensor, new: Tensor, weight: Tensor) -> Tensor:
    """From `old` to `new`, in the dtype of `new`."""
    return torch.lerp(old.to(new.dtype), new, weight.to(new.dtype))


FAMILIES = {
    "features": NormFamily(features),
    "groups": NormFamily(groups),
    "channels": NormFamily(channels),
    "channels_with_stats": NormFamily(channels_with_stats),
    "masked": masked.FAMILY,
}
