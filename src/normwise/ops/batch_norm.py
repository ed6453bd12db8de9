"""Batch normalization: one mean and variance a channel, over the batch and all positions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from normwise.kernels import cpu
from normwise.kernels.arguments import readable
from normwise.ops import check, compiled, plain, ragged, ranks, running, symbolic
from normwise.ops.choose import Call, choose, long_gain_sums, loses_digits, values_visible, watches_digits
from normwise.ops.choose import plain as is_plain
from normwise.ops.norm import finished, norm, times_gain
from normwise.ops.running import Moved
from normwise.ops.sync_batch_norm import sync_batch_norm
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
    process_group: Any = None,
) -> Tensor | PackedSequence:
    r"""act(gamma * (x - mean) / sqrt(var + eps) + beta + residual), statistics a channel over batch and positions.

    In training the statistics are the batch's (biased variance), and the running averages, if given, move towards it
    in place: running = (1 - momentum) * running + momentum * batch, with the unbiased variance. Otherwise the
    statistics are the running averages, or the batch's where there are none. A batch whose statistics are NaN or
    infinite in any channel moves no running average.

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
        process_group: in training the statistics are those of the batches of all ranks of this group; see
            `SyncBatchNorm`. (The layer compares the ranks' channels once, this function in each call.)

    Returns:
        Like the input; 0 at invalid positions, which neither enter the statistics nor receive a gradient.

    Raises:
        ValueError: one value per channel in training, no valid element in a channel, eps <= 0, momentum outside
            [0, 1], lengths out of range.
        ShapeError: shapes that do not fit.
        TypeError: an input that is not floating, a mask that is not bool, lengths that are not integers.

    Source: Ioffe & Szegedy 2015, algorithms 1 and 2.
    """
    traced = symbolic.is_traced(input, weight, mask, lengths, residual)
    call: Callable[..., Any] = partial(symbolic.call_function, batch_norm) if traced else batch_norm_moved
    result = call(
        input,
        running_mean,
        running_var,
        weight,
        bias,
        training,
        momentum,
        eps,
        mask=mask,
        lengths=lengths,
        act=act,
        residual=residual,
        process_group=process_group,
    )
    return result if traced else result[0]  # type: ignore[no-any-return]


def batch_norm_moved(
    input: Tensor | PackedSequence,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | Tensor,
    eps: float,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    act: str | None = None,
    residual: Tensor | PackedSequence | None = None,
    process_group: Any = None,
) -> tuple[Tensor | PackedSequence, Moved]:
    """`batch_norm`, and whether the running averages moved (True also where there are none).

    `process_group` (or a layer's `Peers`): in training the statistics are those of its ranks' batches together.
    """
    if ragged.is_ragged(input):
        moved: Moved = True

        def rows(x: Tensor, residual: Tensor | None) -> Tensor:
            nonlocal moved
            y, moved = batch_norm_moved(
                x,
                running_mean,
                running_var,
                weight,
                bias,
                training,
                momentum,
                eps,
                act=act,
                residual=residual,
                process_group=process_group,
            )
            assert isinstance(y, Tensor)
            return y

        return ragged.by_rows(rows, input, mask=mask, lengths=lengths, residual=residual), moved
    x = check.tensor("batch_norm", input)
    alone = mask is None and lengths is None and act is None and residual is None and process_group is None
    if alone and is_plain(x):
        done = plain.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
        if done is not None:
            return done
    valid = checked(
        "batch_norm", x, running_mean, running_var, weight, bias, momentum, eps, mask, lengths, act, residual
    )
    averages = None if running_mean is None or running_var is None else (running_mean, running_var)
    batch_statistics = training or averages is None
    group = None
    if training and process_group is not None:
        group = ranks.peers(process_group).group("batch_norm", x.device, {"number of channels": x.shape[1]})
    if batch_statistics and group is None:
        enough_values(x, valid, needed=2 if training else 1)
        if x.numel() == 0:
            averages = None  # nothing to learn from an empty batch, as in torch

    assert residual is None or isinstance(residual, Tensor)
    return applied(x, averages, weight, bias, batch_statistics, momentum, eps, valid, act, residual, group)


def checked(
    op: str,
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float | Tensor,
    eps: float,
    mask: Tensor | None,
    lengths: Tensor | None,
    act: str | None,
    residual: Any,
) -> Tensor | None:
    """The valid elements, with as many axes as `x`; raises what `batch_norm` says that it raises."""
    check.floating(op, x)
    check.positive_eps(eps)
    if not isinstance(momentum, Tensor):
        check.momentum_range(momentum)
    if x.dim() < 2:
        raise check.ShapeError(f"expected 2D input or more (got {x.dim()}D input): axis 1 must hold the channels")
    check.channel_vectors(x.shape[1], running_mean, running_var, weight, bias)
    check.same_shape("residual", residual, x)
    check.beside(
        x,
        mask=mask,
        residual=residual,
        weight=weight,
        bias=bias,
        running_mean=running_mean,
        running_var=running_var,
    )
    if act is not None:
        activation(act)
    return check.validity(x, mask, lengths, channel_dim=1)


def applied(
    x: Tensor,
    averages: tuple[Tensor, Tensor] | None,
    weight: Tensor | None,
    bias: Tensor | None,
    batch_statistics: bool,
    momentum: float | Tensor,
    eps: float,
    valid: Tensor | None,
    act: str | None,
    residual: Tensor | None,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Moved]:
    """`batch_norm_moved` of arguments that are in order, `valid` with as many axes as `x`."""
    call = _call(x, averages, weight, bias, batch_statistics, momentum, valid, residual, group)
    if choose(call).backend == "cpu":
        return _compiled(call, momentum, eps, act)
    y, moved = standardized(x, averages, weight, bias, batch_statistics, momentum, eps, valid, group)
    return finished(y, residual, act, valid), moved


def standardized(
    x: Tensor,
    averages: tuple[Tensor, Tensor] | None,
    weight: Tensor | None,
    bias: Tensor | None,
    batch_statistics: bool,
    momentum: float | Tensor,
    eps: float,
    valid: Tensor | None,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Moved]:
    """gamma * (x - mean) / sqrt(var + eps) + beta by the chosen backend, and whether running averages moved."""
    call = _call(x, averages, weight, bias, batch_statistics, momentum, valid, group=group)
    dims = call.dims
    backend = choose(call).backend
    if backend == "cpu":
        return _compiled(call, momentum, eps, None)
    if backend == "torch":
        by_aten = _aten(x, averages, weight, bias, batch_statistics, float(momentum), eps)
        if by_aten is not None:
            return by_aten
    shape = (1, -1) + (1,) * (x.dim() - 2)
    gain, shift = (None if t is None else t.view(shape) for t in (weight, bias))
    if group is not None:
        return sync_batch_norm(x, averages, gain, shift, momentum, eps, valid, group)
    if not batch_statistics and averages is not None:
        mean, var = (t.view(shape) for t in averages)
        return norm(x, dims, gain, shift, mask=valid, mean=mean, var=var, eps=eps)[0], True
    y, moments = norm(x, dims, gain, shift, mask=valid, eps=eps)
    return y, True if averages is None else running.move(*averages, moments, momentum)


def _call(
    x: Tensor,
    averages: tuple[Tensor, Tensor] | None,
    weight: Tensor | None,
    bias: Tensor | None,
    batch_statistics: bool,
    momentum: float | Tensor,
    valid: Tensor | None,
    residual: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> Call:
    return Call(
        "batch_norm",
        x,
        (0, *range(2, x.dim())),
        weight=weight,
        bias=bias,
        mask=valid,
        residual=residual,
        averages=averages,
        batch_statistics=batch_statistics,
        fixed_momentum=not isinstance(momentum, Tensor),
        over_ranks=group is not None,
    )


def _compiled(call: Call, momentum: float | Tensor, eps: float, act: str | None) -> tuple[Tensor, Moved]:
    """By the kernel of channels, activation and residual included."""
    return compiled.channels(
        compiled.dense(call.x),
        call.residual,
        call.weight,
        call.bias,
        call.averages,
        compiled.mask_of_positions(call),
        call.batch_statistics,
        float(momentum),
        eps,
        act,
    )


def _aten(
    x: Tensor,
    averages: tuple[Tensor, Tensor] | None,
    weight: Tensor | None,
    bias: Tensor | None,
    batch_statistics: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Moved] | None:
    """ATen's result and whether running averages moved, or None, and nothing moved, where it lost digits."""
    watched = watches_digits(x)
    # ATen reads them as if they were contiguous; averages that move are copied anyway.
    weight, bias = (None if t is None else t.contiguous() for t in (weight, bias))
    if watched and long_gain_sums(x, weight, x.numel() // x.shape[1]):
        found = _aten(x, averages, None, None, batch_statistics, momentum, eps)
        if found is None:
            return None
        return times_gain(found[0], weight, bias, (1, -1, *(1,) * (x.dim() - 2))), found[1]
    if averages is None or not batch_statistics:
        mean, var = (None, None) if averages is None else (t.contiguous() for t in averages)
        if not watched:
            cudnn = torch.backends.cudnn.enabled
            return torch.batch_norm(x, weight, bias, mean, var, batch_statistics, momentum, eps, cudnn), True
        if mean is not None and var is not None and loses_digits(mean, torch.rsqrt(var + eps)):
            return None
        y, *used = torch.native_batch_norm(x, weight, bias, mean, var, batch_statistics, momentum, eps)
        return None if batch_statistics and loses_digits(*used) else (y, True)
    # ATen moves copies: what it makes of a batch may not be wanted, and it saves them for a backward that does not
    # read them in training, so that moving the averages again before the backward is no error.
    # In the wider dtype of averages and gain (BatchRenorm's): ATen takes no two.
    dtype = averages[0].dtype if weight is None else torch.promote_types(averages[0].dtype, weight.dtype)
    mean, var = (average.detach().to(dtype, copy=True) for average in averages)
    if watched:
        y, *used = torch.native_batch_norm(x, weight, bias, mean, var, True, momentum, eps)
        if loses_digits(*used):
            return None
    else:
        y = torch.batch_norm(x, weight, bias, mean, var, True, momentum, eps, torch.backends.cudnn.enabled)
    return y, running.replace(averages, (mean, var))


def enough_values(x: Tensor, valid: Tensor | None, needed: int) -> None:
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
    if valid.shape[1] == 1:  # the mask is that of all channels
        at_hand = readable(valid) and valid.is_contiguous() and cpu.available()
        found = cpu.count_valid(valid, needed) if at_hand else int(torch.count_nonzero(valid))
        count = found * (x.numel() // (x.shape[1] * valid.numel()))
    else:
        count = int(count_valid(x, (0, *range(2, x.dim())), valid).min())
    if count == 0:
        raise ValueError(
            "mask (or lengths) leaves no valid element for a channel: there is nothing to take statistics of. Leave "
            "such a "
            "batch out, or use eval mode"
        )
    if needed > 1:
        check.more_than_one(count, x, check.BATCH_OF_ONE_CURE)
