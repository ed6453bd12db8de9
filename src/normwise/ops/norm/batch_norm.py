"""Batch normalization: one mean and variance per channel, over the batch and all positions."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from normwise.ops import symbolic
from normwise.ops.dispatch import is_traced_or_transformed
from normwise.ops.errors import ShapeError
from normwise.ops.norm import running_stats
from normwise.ops.norm.batch_norm_with_stats import batch_norm_with_stats


class BatchNormOutput(NamedTuple):
    """What `batch_norm(..., return_stats=True)` returns: the output, and the running statistics after the call.

    In training the statistics are new tensors, without a gradient and in the dtype of those given, of which none has
    changed; in evaluation they are those given. Where a batch moves nothing (its statistics are not finite, or it is
    empty), they are copies.
    """

    output: Any
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor | None = None


def batch_norm(
    input: Tensor | PackedSequence,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | Tensor | None = 0.1,
    eps: float = 1e-5,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    act: str | None = None,
    residual: Tensor | PackedSequence | None = None,
    process_group: Any = None,
    segments: Tensor | None = None,
    dim: int = 1,
    correction: int = 1,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    num_batches_tracked: Tensor | None = None,
    return_stats: bool = False,
) -> Any:
    r"""act(gamma * (x - mean) / sqrt(var + eps) + beta + residual), statistics a channel over batch and positions.

    In training the statistics are the batch's (biased variance), and the running averages, if given, move towards it
    in place: running = (1 - momentum) * running + momentum * batch, with the unbiased variance. Otherwise the
    statistics are the running averages, or the batch's where there are none. A batch whose statistics are NaN or
    infinite in any channel moves no running average.

    With `return_stats` nothing that is given changes, and the new running statistics are values beside the output:
    for `torch.func` (grad, vmap, jacrev), and for several forwards in training before one backward.

    The running statistics of one of several domains are simply those that are passed, so that there is no `domain`
    here: `running_mean[k]`, a view, is moved in place, and with `return_stats` the caller puts the new ones where they
    belong. A batch of mixed domains takes a layer, `BatchNorm1d(C, domains=K)`.

    Args:
        input: (N, C) or (N, C, ...); or a PackedSequence or jagged nested tensor of rows of C features.
        running_mean, running_var: (C,), changed in place in training, but for `return_stats`.
        weight, bias: (C,): gamma and beta.
        training: use the batch's statistics.
        momentum: weight of the new batch in the running averages, in [0, 1]; None for a cumulative average, the mean of
            all batches, for which `num_batches_tracked` is needed.
        eps: added to the variance.
        mask: bool, True = valid: (N, ...), the input without its channel axis, or broadcastable to the input.
        lengths: (N,) integers, valid steps along the last axis of (N, C, ..., L).
        act: "relu", "leaky_relu", "silu", "gelu", "relu6", "hardswish", "hardsigmoid", "elu", "gelu_tanh", "softplus"
            or "mish", applied last: torch.nn.functional's by their defaults, "gelu_tanh" gelu(approximate="tanh").
        residual: like the input, added before `act`.
        process_group: in training the statistics are those of the batches of all ranks of this group; see
            `SyncBatchNorm`. (The layer compares the ranks' channels once, this function in each call.)
        segments: (R,) integers for an input (R, C): which graph, cloud or data set a row belongs to. In training each
            segment is normalized as a batch of its own (one of a single row gives its bias); running averages are those
            of all rows, pooled.
        dim: the axis of the channels, e.g. -1 for (N, L, C); mask and residual are laid out as the input.
        correction: the running variance is of squares over count - correction: 1 is torch's, 0 that of Keras and Flax.
        scale, shift: (N, C), one for each sample, or of as many axes as the input, to which it broadcasts: the
            normalized input with gain and bias is multiplied by 1 + scale and shift is added, before the residual.
        num_batches_tracked: 0-d int64: the batches seen so far; in training this one is counted, in place but for
            `return_stats`.
        return_stats: return a `BatchNormOutput`.

    Returns:
        Like the input; 0 at invalid positions, which neither enter the statistics nor receive a gradient. With
        `return_stats` a `BatchNormOutput` (output, running_mean, running_var, num_batches_tracked).

    Raises:
        ValueError: one value per channel in training, no valid element in a channel, eps <= 0, momentum outside
            [0, 1], lengths out of range, momentum=None without a count of batches, return_stats without running
            statistics. (What only values show, of a mask or lengths, is checked on the CPU alone.)
        ShapeError: shapes that do not fit.
        TypeError: an input that is not floating, a mask that is not bool, lengths that are not integers.

    Source: Ioffe & Szegedy 2015, algorithms 1 and 2.
    """
    modulated = not (scale is shift is None)
    if symbolic.is_traced(input, weight, mask, lengths, residual, segments) or (
        modulated and symbolic.is_traced(scale, shift)
    ):
        return symbolic.call_function(
            batch_norm,
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
            segments=segments,
            dim=None if dim == 1 else dim,
            correction=None if correction == 1 else correction,
            scale=scale,
            shift=shift,
            num_batches_tracked=num_batches_tracked,
            return_stats=return_stats or None,
        )
    if num_batches_tracked is not None:
        _check_count(num_batches_tracked)
    stats = running_mean, running_var, num_batches_tracked
    if return_stats:
        if running_mean is None or running_var is None:
            raise ValueError(
                "batch_norm: return_stats=True returns running statistics, but got none: give running_mean and "
                "running_var (of zeros and ones, and with momentum=1.0, they become the batch's own)"
            )
        if training:
            stats = tuple(_copied(t, (input, mask, lengths, segments, momentum)) for t in stats)  # type: ignore[assignment]
    if momentum is None:
        momentum = _cumulative(num_batches_tracked) if training and running_mean is not None else 0.0
    output, _ = batch_norm_with_stats(
        input,
        *stats[:2],
        weight,
        bias,
        training,
        momentum,
        eps,
        num_batches_tracked=stats[2],
        mask=mask,
        lengths=lengths,
        act=act,
        residual=residual,
        process_group=process_group,
        segments=segments,
        dim=dim,
        correction=correction,
        scale=scale,
        shift=shift,
        stats_are_copies=return_stats,
    )
    return BatchNormOutput(output, *stats) if return_stats else output  # type: ignore[arg-type]


def _check_count(tracked: Any) -> None:
    if not isinstance(tracked, Tensor) or tracked.dtype != torch.int64:
        found = tracked.dtype if isinstance(tracked, Tensor) else type(tracked).__name__
        raise TypeError(
            f"num_batches_tracked must be a tensor of int64, but got {found}: give torch.tensor(0) at the start"
        )
    if tracked.dim():
        raise ShapeError(
            f"num_batches_tracked must be one number, of shape (), but got {tuple(tracked.shape)}: one of a layer's "
            "domains is num_batches_tracked[k]"
        )


def _cumulative(tracked: Tensor | None) -> float | None:
    """The weight of the next batch in a cumulative average; None where ops have to take it from the count."""
    if tracked is None or not running_stats.can_read_now(tracked):
        return None
    return 1.0 / (int(tracked) + 1)


def _copied(t: Tensor | None, others: tuple[Any, ...]) -> Tensor | None:
    """A copy of `t` to be changed in place."""
    if t is None:
        return None
    t = t.detach()
    if not torch.compiler.is_compiling() and not is_traced_or_transformed():
        return t.clone()
    # Under vmap what is changed in place must be batched where anything is that it will be changed by.
    for other in others:
        other = other.data if isinstance(other, PackedSequence) else other
        if isinstance(other, Tensor):
            t = t + other.new_zeros((), dtype=t.dtype, device=t.device)
    return t
