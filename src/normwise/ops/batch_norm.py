"""Batch normalization: one mean and variance a channel, over the batch and all positions."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from normwise.ops import check, compiled, ragged, running
from normwise.ops.choose import Call, choose, loses_digits, small, values_visible, watches_digits
from normwise.ops.norm import norm
from normwise.reference import activation, count_valid


def batch_norm(
    input: Tensor | PackedSequence,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    act: str | None = None,
    residual: Tensor | PackedSequence | None = None,
) -> Tensor | PackedSequence:
    r"""act(gamma * (x - mean) / sqrt(var + eps) + beta + residual), statistics a channel over batch and positions.

    In training the statistics are the batch's (biased variance), and the running averages, if given, move towards it
    in place: running = (1 - momentum) * running + momentum * batch, with the unbiased variance. Otherwise the
    statistics are the running averages, or the batch's where there are none.

    Args:
        input: (N, C) or (N, C, ...); or a PackedSequence or jagged nested tensor of rows of C features.
        running_mean, running_var: (C,), changed in place in training.
        weight, bias: (C,): gamma and beta.
        training: use the batch's statistics.
        momentum: weight of the new batch in the running averages, in [0, 1].
        eps: added to the variance.
        mask: bool, True = valid: (N, ...), the input without its channel axis, or broadcastable to the input.
        lengths: (N,) integers, valid steps along the last axis of (N, C, ..., L).
        act: "relu", "leaky_relu", "silu" or "gelu", applied last.
        residual: like the input, added before `act`.

    Returns:
        Like the input; 0 at invalid positions, which neither enter the statistics nor receive a gradient.

    Raises:
        ValueError: one value per channel in training, no valid element in a channel, eps <= 0, momentum outside
            [0, 1], lengths out of range.
        ShapeError: shapes that do not fit.
        TypeError: an input that is not floating, a mask that is not bool, lengths that are not integers.

    Source: Ioffe & Szegedy 2015, algorithms 1 and 2.
    """
    if ragged.is_ragged(input):
        rows = partial(
            batch_norm,
            running_mean=running_mean,
            running_var=running_var,
            weight=weight,
            bias=bias,
            training=training,
            momentum=momentum,
            eps=eps,
            act=act,
        )
        return ragged.by_rows(rows, input, mask=mask, lengths=lengths, residual=residual)  # type: ignore[no-any-return]
    assert isinstance(input, Tensor)
    x = input
    if training and mask is None and lengths is None and act is None and residual is None and small(x):
        by_aten = _small(x, running_mean, running_var, weight, bias, momentum, eps)
        if by_aten is not None:
            return by_aten
    check.floating("batch_norm", x)
    check.positive_eps(eps)
    if not isinstance(momentum, Tensor):
        check.momentum_range(momentum)
    if x.dim() < 2:
        raise check.ShapeError(f"expected 2D input or more (got {x.dim()}D input): axis 1 must hold the channels")
    channels = x.shape[1]
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var go together: give both or neither")
    for name, value in (
        ("running_mean", running_mean),
        ("running_var", running_var),
        ("weight", weight),
        ("bias", bias),
    ):
        check.per_channel(name, value, channels)
    check.same_shape("residual", residual, x)
    valid = check.validity(x, mask, lengths, channel_dim=1)
    transform = None if act is None else activation(act)

    averages = None if running_mean is None or running_var is None else (running_mean, running_var)
    batch_statistics = training or averages is None
    if batch_statistics:
        _enough_values(x, valid, needed=2 if training else 1)
    if x.numel() == 0 and batch_statistics:
        averages = None  # nothing to learn from an empty batch, as in torch

    assert residual is None or isinstance(residual, Tensor)
    call = _call(x, averages, weight, batch_statistics, momentum, valid, residual)
    if choose(call).backend == "cpu":
        return _compiled(call, bias, momentum, eps, act)
    y = standardized(x, averages, weight, bias, batch_statistics, momentum, eps, valid)
    if residual is not None:
        y = y + residual
    if transform is not None:
        y = transform(y)
    if valid is not None and residual is not None:
        y = y.masked_fill(~valid, 0)
    return y


def standardized(
    x: Tensor,
    averages: tuple[Tensor, Tensor] | None,
    weight: Tensor | None,
    bias: Tensor | None,
    batch_statistics: bool,
    momentum: float | Tensor,
    eps: float,
    valid: Tensor | None,
) -> Tensor:
    """gamma * (x - mean) / sqrt(var + eps) + beta by the chosen backend; running averages (mean, var) moved."""
    call = _call(x, averages, weight, batch_statistics, momentum, valid)
    dims = call.dims
    backend = choose(call).backend
    if backend == "cpu":
        return _compiled(call, bias, momentum, eps, None)
    if backend == "torch":
        by_aten = _aten(x, averages, weight, bias, batch_statistics, float(momentum), eps)
        if by_aten is not None:
            return by_aten
    shape = (1, -1) + (1,) * (x.dim() - 2)
    gain, shift = (None if t is None else t.view(shape) for t in (weight, bias))
    if not batch_statistics and averages is not None:
        mean, var = (t.view(shape) for t in averages)
        return norm(x, dims, gain, shift, mask=valid, mean=mean, var=var, eps=eps)[0]
    y, moments = norm(x, dims, gain, shift, mask=valid, eps=eps)
    if averages is not None:
        running.move(*averages, moments, momentum)
    return y


def _call(
    x: Tensor,
    averages: tuple[Tensor, Tensor] | None,
    weight: Tensor | None,
    batch_statistics: bool,
    momentum: float | Tensor,
    valid: Tensor | None,
    residual: Tensor | None = None,
) -> Call:
    return Call(
        "batch_norm",
        x,
        (0, *range(2, x.dim())),
        weight=weight,
        mask=valid,
        residual=residual,
        averages=averages,
        batch_statistics=batch_statistics,
        fixed_momentum=not isinstance(momentum, Tensor),
    )


def _compiled(call: Call, bias: Tensor | None, momentum: float | Tensor, eps: float, act: str | None) -> Tensor:
    """By the kernel of channels, activation and residual included."""
    x = call.x
    if not x.movedim(1, -1).is_contiguous():
        x = x.contiguous()
    mask = None if call.mask is None else call.mask.squeeze(1).expand(x.shape[0], *x.shape[2:]).reshape(x.shape[0], -1)
    return compiled.channels(
        x,
        call.residual,
        call.weight,
        bias,
        call.averages,
        mask,
        call.batch_statistics,
        float(momentum),
        eps,
        act,
    )


def _small(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float | Tensor,
    eps: float,
) -> Tensor | None:
    """ATen's result in training without further ado; None, and nothing moved, where it takes more to say what is
    right, or wrong."""
    # Of few values a channel some mean nearly always dwarfs its deviation: ATen's result would be thrown away.
    if (
        x.dim() < 2
        or x.numel() < 16 * x.shape[1]
        or type(momentum) is not float
        or not 0 <= momentum <= 1
        or not eps > 0
    ):
        return None
    if running_mean is None or running_var is None:
        return None
    per_channel = (x.shape[1],)
    if any(t is not None and t.shape != per_channel for t in (running_mean, running_var, weight, bias)):
        return None  # this form of ATen's op does not look
    before = running_mean.clone(), running_var.clone()
    # `.data`: see `_aten`.
    moved = running_mean.data, running_var.data
    try:
        y, mean, rstd = torch.native_batch_norm(x, weight, bias, *moved, True, momentum, eps)
    except RuntimeError:
        return None  # the full path says what does not fit
    if loses_digits(mean, rstd):
        for average, old in zip(moved, before, strict=True):
            average.copy_(old)
        return None
    return y


def _aten(
    x: Tensor,
    averages: tuple[Tensor, Tensor] | None,
    weight: Tensor | None,
    bias: Tensor | None,
    batch_statistics: bool,
    momentum: float,
    eps: float,
) -> Tensor | None:
    """ATen's result with the running averages moved, or None, and nothing moved, where it lost digits."""
    if not watches_digits(x):
        if averages is not None and batch_statistics and not torch.compiler.is_compiling():
            # ATen saves the averages for a backward that does not read them in training. `.data` has a version counter
            # of its own, so that moving the averages again before the backward is no error.
            averages = (averages[0].data, averages[1].data)
        mean, var = averages or (None, None)
        cudnn = torch.backends.cudnn.enabled
        return torch.batch_norm(x, weight, bias, mean, var, batch_statistics, momentum, eps, cudnn)
    if not batch_statistics and averages is not None:
        if loses_digits(averages[0], torch.rsqrt(averages[1] + eps)):
            return None
        mean, var = averages
        return torch.native_batch_norm(x, weight, bias, mean, var, False, momentum, eps)[0]
    new_mean, new_var = (None, None) if averages is None else (averages[0].clone(), averages[1].clone())
    y, mean, rstd = torch.native_batch_norm(x, weight, bias, new_mean, new_var, True, momentum, eps)
    if loses_digits(mean, rstd):
        return None
    if averages is not None and new_mean is not None and new_var is not None:
        with torch.no_grad():
            averages[0].copy_(new_mean)
            averages[1].copy_(new_var)
    return y


def _enough_values(x: Tensor, valid: Tensor | None, needed: int) -> None:
    """A channel needs one value for a mean and two for a deviation."""
    if valid is None:
        if needed > 1:
            values = x.shape[0]
            for size in x.shape[2:]:
                values *= size
            check.more_than_one(values, x, check.BATCH_OF_ONE_CURE)
        return
    if not values_visible(valid) or x.numel() == 0:
        return
    count = int(count_valid(x, (0, *range(2, x.dim())), valid).min())
    if count == 0:
        raise ValueError(
            "mask (or lengths) leaves no valid element for a channel: there is nothing to take statistics of. Leave "
            "such a "
            "batch out, or use eval mode"
        )
    if needed > 1:
        check.more_than_one(count, x, check.BATCH_OF_ONE_CURE)
