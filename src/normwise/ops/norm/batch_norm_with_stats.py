"""Batch normalization as a layer calls it, with all that its arguments and its state ask for."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from normwise.backends.protocol import NormConfig, NormRequest, accumulation_dtype
from normwise.backends.reference import combined
from normwise.ops import inputs, ragged, validity
from normwise.ops._torch_internals import readable
from normwise.ops.dispatch import jit_traces
from normwise.ops.norm import running_stats
from normwise.ops.norm.domains import batch_norm_of_domains
from normwise.ops.norm.ghost_batch_norm import ghost_batch_norm
from normwise.ops.norm.modulation import Given, of_channels
from normwise.ops.norm.run import run, run_modulated, run_with_correction
from normwise.ops.norm.running_stats import Updated
from normwise.ops.norm.segments import segment_norm, segments_of
from normwise.ops.norm.sync_batch_norm import over_ranks


def batch_norm_with_stats(
    input: Tensor | PackedSequence,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | Tensor | None,
    eps: float,
    *,
    num_batches_tracked: Tensor | None = None,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    act: str | None = None,
    residual: Tensor | PackedSequence | None = None,
    process_group: Any = None,
    virtual_batch_size: int | None = None,
    ranks: Sequence[int] | None = None,
    segments: Tensor | None = None,
    dim: int = 1,
    correction: int = 1,
    domain: Tensor | None = None,
    domains: int = 0,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    stats_are_copies: bool = False,
    by_sample: tuple[Tensor | None, Tensor | None] | None = None,
) -> tuple[Any, Updated]:
    """`batch_norm`, and whether the running statistics were updated (True also where there are none to update).

    Args:
        momentum: also None, for that of a cumulative average, if there is `num_batches_tracked`.
        num_batches_tracked: 0-d int64, counts updates.
        process_group: a torch.distributed group, or a layer's `StatsGroup`.
        virtual_batch_size: statistics of virtual batches of so many samples, see `ghost_batch_norm`.
        ranks: the numbers of axes that a layer accepts.
        domain: (N,) integers: which of so many `domains` each sample is of, see `batch_norm_of_domains`.
        stats_are_copies: the caller's, who wants to see them updated whenever this runs.
        by_sample: gain and bias (N, C, 1, ...), instead of `weight` and `bias`, for a kernel that takes them; where
            there is none the output is None, and nothing has changed.
    """
    if not (scale is shift is None):
        if domain is not None:
            raise ValueError(
                "batch_norm: scale and shift go with one domain for the whole batch, not with one for each sample"
            )
        call = partial(
            batch_norm_with_stats,
            running_mean=running_mean,
            running_var=running_var,
            training=training,
            momentum=momentum,
            eps=eps,
            num_batches_tracked=num_batches_tracked,
            process_group=process_group,
            virtual_batch_size=virtual_batch_size,
            ranks=ranks,
            segments=segments,
            correction=correction,
            stats_are_copies=stats_are_copies,
        )
        given = {"mask": mask, "lengths": lengths, "act": act, "residual": residual, "dim": dim}
        return _modulated(call, input, weight, bias, Given(scale, shift), given)
    if dim != 1:
        input, mask, residual = inputs.channels_to_axis_1("batch_norm", input, dim, mask, residual)
    if domain is not None:
        excluded = {"segments": segments, "process_group": process_group, "virtual_batch_size": virtual_batch_size}
        y, updated = batch_norm_of_domains(
            input,
            domain,
            running_mean,
            running_var,
            weight,
            bias,
            training,
            momentum,
            eps,
            num_batches_tracked=num_batches_tracked,
            mask=mask,
            lengths=lengths,
            act=act,
            residual=residual,
            correction=correction,
            domains=domains,
            ranks=ranks,
            excluded=excluded,
        )
        return (y if dim == 1 else y.movedim(1, dim)), updated
    found = None
    if segments is not None:
        excluded = {"lengths": lengths, "process_group": process_group, "virtual_batch_size": virtual_batch_size}
        found = segments_of("batch_norm", segments, inputs.tensor("batch_norm", input), **excluded)
        inputs.rank(input, (2,))  # type: ignore[arg-type]
    if ranks is not None:
        ragged.rank_or_rows(input, ranks, "BatchNorm1d")
    if ragged.is_ragged(input):
        if virtual_batch_size is not None:
            raise ValueError(
                f"virtual_batch_size={virtual_batch_size} counts samples, which rows of a ragged input do not tell "
                "apart: give a padded input with lengths="
            )
        rows = partial(
            batch_norm_with_stats,
            running_mean=running_mean,
            running_var=running_var,
            weight=weight,
            bias=bias,
            training=training,
            momentum=momentum,
            eps=eps,
            num_batches_tracked=num_batches_tracked,
            act=act,
            process_group=process_group,
            stats_are_copies=stats_are_copies,
        )
        return ragged.by_rows(rows, input, mask=mask, lengths=lengths, residual=residual)  # type: ignore[no-any-return]
    x = inputs.tensor("batch_norm", input)
    valid, known_readable = inputs.validate_channels(
        "batch_norm", x, running_mean, running_var, weight, bias, momentum, eps, mask, lengths, act, residual
    )
    batch_statistics = training or running_mean is None
    if training and virtual_batch_size is not None and jit_traces():
        raise RuntimeError(
            "torch.jit.trace cannot follow BatchNorm in training with virtual_batch_size=, which goes by the sizes of "
            "each batch: trace it in eval mode, or use torch.compile"
        )
    if training and running_mean is not None and not stats_are_copies and running_stats.is_recomputing():
        # What there is to learn, the first run has learnt; clones, because it must run as it ran then.
        running_mean, running_var = running_mean.clone(), running_var.clone()  # type: ignore[union-attr]
        num_batches_tracked = None if num_batches_tracked is None else num_batches_tracked.clone()
    if momentum is None and training and running_mean is not None and num_batches_tracked is None:
        raise ValueError(
            "momentum=None is the weight of a cumulative average, for which a layer counts its batches: give "
            "num_batches_tracked=, or a number, 1 / (the number of batches with this one)"
        )
    if found is not None and batch_statistics and x.numel():
        options: dict[str, Any] = {"weight": weight, "bias": bias, "valid": valid, "act": act, "residual": residual}
        y, parts = segment_norm("batch_norm", x, found, across_features=False, eps=eps, **options)
        y = y if dim == 1 else y.movedim(1, dim)
        if running_mean is None or running_var is None:
            return y, True
        config = NormConfig("batch_norm", "channels", eps, act, momentum=momentum)
        stats = (running_mean, running_var, num_batches_tracked)
        return y, running_stats.update_from_moments(config, *stats, combined(parts), correction)
    formula = None
    if training and process_group is not None:
        formula = over_ranks(process_group, x, valid)
    if batch_statistics and formula is None:
        validity.enough_values(x, valid, needed=2 if training else 1)
        if x.numel() == 0:
            if num_batches_tracked is not None:
                num_batches_tracked.add_(1)
            running_mean = running_var = num_batches_tracked = None  # nothing to learn from an empty batch, as in torch
    config = NormConfig("batch_norm", "channels", eps, act, batch_statistics=batch_statistics, momentum=momentum)
    request = NormRequest(
        config,
        inputs.dense(x),
        residual,  # type: ignore[arg-type]
        weight,
        bias,
        valid,
        running_mean,
        running_var,
        num_batches_tracked,
    )
    if by_sample is not None:
        request = request._replace(weight=by_sample[0], bias=by_sample[1])
        found_by_kernel = run_modulated(request, None, False)
        if found_by_kernel is None:
            return None, True
        y, updated = found_by_kernel.y, found_by_kernel.stats_updated  # type: ignore[assignment]
    elif training and virtual_batch_size is not None:
        y, updated = ghost_batch_norm(request, virtual_batch_size, correction)
    elif correction != 1 and batch_statistics and request.running_mean is not None:
        y, updated = run_with_correction(request, formula, correction)
    else:
        result = run(request, formula, known_readable and readable(num_batches_tracked))
        y, updated = result.y, result.stats_updated  # type: ignore[assignment]
    return (y if dim == 1 else y.movedim(1, dim)), updated


def _modulated(
    call: partial[tuple[Any, Updated]],
    input: Any,
    weight: Tensor | None,
    bias: Tensor | None,
    given: Given,
    options: dict[str, Any],
) -> tuple[Any, Updated]:
    """`batch_norm_with_stats`, of which `call` has the statistics, with scale or shift."""
    said = call.keywords
    mean, var, ranks, segments = (said[name] for name in ("running_mean", "running_var", "ranks", "segments"))
    if segments is not None:
        segments_of("batch_norm", segments, inputs.tensor("batch_norm", input), lengths=options["lengths"])
    if ranks is not None:
        ragged.rank_or_rows(input, ranks, "BatchNorm1d")

    def bare(x: Tensor, **options: Any) -> tuple[Any, Updated]:
        if mean is None or mean.dtype.itemsize >= 4:
            return call(x, weight=None, bias=None, **options)
        # Kernels of float32 take no averages in half precision.
        wide = accumulation_dtype(x.dtype)
        stats = {"running_mean": mean.to(wide), "running_var": var.to(wide)}
        found = call(x, weight=None, bias=None, **options, **stats)
        if said["training"]:
            mean.copy_(stats["running_mean"])
            var.copy_(stats["running_var"])
        return found

    def fused(x: Tensor, samples: int, gain: Tensor | None, bias: Tensor | None, **options: Any) -> Any:
        stats = (t.to(accumulation_dtype(x.dtype)).repeat(samples) for t in (mean, var))
        fixed = {**dict(zip(("running_mean", "running_var"), stats, strict=True)), "ranks": None}
        return call(x, weight=gain, bias=bias, **fixed, **options)[0]

    elsewhere = any(said[name] is not None for name in ("segments", "process_group", "virtual_batch_size"))
    kernel = None if elsewhere or (said["training"] and said["correction"] != 1) else bare
    moving = said["training"] or mean is None or segments is not None
    options |= {"running": (mean, var), "momentum": said["momentum"], "eps": said["eps"]}
    fused_or_none = None if moving else fused
    y, updated = of_channels("batch_norm", bare, fused_or_none, input, weight, bias, given, kernel=kernel, **options)
    return y, True if updated is None else updated
