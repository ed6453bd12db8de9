"""Batch renormalization: batch normalization whose gain and bias carry the correction towards running averages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from normwise.backends.channels import channel_dims
from normwise.backends.protocol import Moments, NormConfig, NormRequest, accumulation_dtype
from normwise.backends.reference import moments, renorm_correction
from normwise.ops import inputs, ragged, validity
from normwise.ops.norm import running_stats
from normwise.ops.norm.modulation import Given, of_channels
from normwise.ops.norm.run import run, run_with_correction
from normwise.ops.norm.running_stats import Updated

# A limit of the correction: a number, or a function of the number of batches so far.
Limit: TypeAlias = float | Callable[[Any], Any]


def batch_renorm_with_stats(
    input: Tensor | PackedSequence,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float | Tensor | None,
    eps: float,
    r_max: Limit,
    d_max: Limit,
    *,
    num_batches_tracked: Tensor,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    act: str | None = None,
    residual: Tensor | PackedSequence | None = None,
    ranks: Sequence[int] | None = None,
    dim: int = 1,
    correction: int = 1,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> tuple[Any, Updated]:
    """act(gamma * ((x - mean_B) / sigma_B * r + d) + beta + residual) in training, and whether the running statistics
    were updated.

    r and d, see `reference.renorm_correction`, are taken before that update, and no gradient flows through them. All
    else is as in `normwise.functional.batch_norm`, except that one value per channel is allowed: it standardizes to 0,
    and the output is gamma * d + beta.

    Raises:
        RuntimeError: a forward that activation checkpointing runs again: the averages that r and d came from have moved
            since.

    Source: Ioffe 2017, algorithm 1.
    """
    if ranks is not None:
        ragged.rank_or_rows(input, ranks, "BatchRenorm1d")
    if not (scale is shift is None):

        def bare(x: Tensor, mask: Tensor | None) -> tuple[Any, Updated]:
            stats = (running_mean, running_var, None, None, momentum, eps, r_max, d_max)
            options: dict[str, Any] = {"num_batches_tracked": num_batches_tracked, "correction": correction}
            return batch_renorm_with_stats(x, *stats, mask=mask, **options)

        given: dict[str, Any] = {"mask": mask, "lengths": lengths, "act": act, "residual": residual, "dim": dim}
        given |= {"running": (running_mean, running_var), "momentum": momentum, "eps": eps}
        return of_channels("batch_renorm", bare, None, input, weight, bias, Given(scale, shift), **given)
    if ragged.is_ragged(input):
        rows = partial(
            batch_renorm_with_stats,
            running_mean=running_mean,
            running_var=running_var,
            weight=weight,
            bias=bias,
            momentum=momentum,
            eps=eps,
            r_max=r_max,
            d_max=d_max,
            num_batches_tracked=num_batches_tracked,
            act=act,
        )
        return ragged.by_rows(rows, input, mask=mask, lengths=lengths, residual=residual)  # type: ignore[no-any-return]
    if running_stats.is_recomputing():
        raise RuntimeError(
            "BatchRenorm was run again inside a backward (activation checkpointing), but the running averages that its "
            "correction is taken from were updated in its first run: leave this layer outside of the checkpoint"
        )
    if dim != 1:
        input, mask, residual = inputs.channels_to_axis_1("batch_renorm", input, dim, mask, residual)
    x = inputs.tensor("batch_renorm", input)
    valid, _ = inputs.validate_channels(
        "batch_renorm", x, running_mean, running_var, weight, bias, momentum, eps, mask, lengths, act, residual
    )
    validity.enough_values(x, valid, needed=1)
    step = int(num_batches_tracked) if running_stats.can_read_now(num_batches_tracked) else num_batches_tracked
    r_limit, d_limit = (limit(step) if callable(limit) else limit for limit in (r_max, d_max))
    r, d = _correction(_moments(x, valid), running_mean, running_var, r_limit, d_limit, eps)
    # With gain gamma * r and bias gamma * d + beta it is a batch norm, which all its kernels compute in one go.
    wide = accumulation_dtype(x.dtype)
    gain = r if weight is None else r * weight.to(wide)
    shift = d if weight is None else d * weight.to(wide)
    if bias is not None:
        shift = shift + bias.to(wide)
    config = NormConfig("batch_norm", "channels", eps, act, momentum=momentum)
    stats = (running_mean, running_var, num_batches_tracked) if x.numel() else (None, None, None)
    request = NormRequest(config, inputs.dense(x), residual, gain, shift, valid, *stats)  # type: ignore[arg-type]
    if correction != 1 and stats[0] is not None:
        y, updated = run_with_correction(request, None, correction)
    else:
        result = run(request)
        y, updated = result.y, result.stats_updated  # type: ignore[assignment]
    return (y if dim == 1 else y.movedim(1, dim)), updated


def _moments(x: Tensor, valid: Tensor | None) -> Moments:
    """Of each channel, as vectors."""
    dims = channel_dims(x)
    with torch.no_grad():
        if valid is not None or x.numel() == 0:
            found = moments(x, dims, valid)
            return Moments(*(m.expand_as(found.mean).reshape(-1) for m in found))
        var, mean = torch.var_mean(x.to(accumulation_dtype(x.dtype)), dims, correction=0)
        return Moments(mean, var, torch.full_like(mean, x.numel() // x.shape[1]))


def _correction(
    batch: Moments,
    running_mean: Tensor,
    running_var: Tensor,
    r_max: float | Tensor,
    d_max: float | Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """`normwise.reference.renorm_correction`, as one node while compiling."""
    if not torch.compiler.is_compiling():
        return renorm_correction(batch, running_mean, running_var, r_max, d_max, eps)
    limits = [torch.as_tensor(limit, dtype=batch.mean.dtype, device=batch.mean.device) for limit in (r_max, d_max)]
    with torch.no_grad():
        return _renorm_correction(  # type: ignore[no-any-return]
            batch.mean, batch.var, running_mean, running_var, *limits, eps
        )


# A compiled backward may compute again what is cheap; r and d would then come from averages that have moved. The
# result of an op that the compiler does not know is kept.
def _run_renorm_correction(
    batch_mean: Tensor,
    batch_var: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    r_max: Tensor,
    d_max: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    batch = Moments(batch_mean, batch_var, torch.ones_like(batch_mean))
    return renorm_correction(batch, running_mean, running_var, r_max, d_max, eps)


# Handed over, see ops/custom_op/norm.py.
_renorm_correction = torch.library.custom_op("normwise::renorm_correction", _run_renorm_correction, mutates_args=())


@_renorm_correction.register_fake
def _(
    batch_mean: Tensor,
    batch_var: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    r_max: Tensor,
    d_max: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(batch_mean), torch.empty_like(batch_var)
