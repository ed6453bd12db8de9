"""Running averages of batch statistics: the third answer, "where the statistics come from", for evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from normwise.backends.devices import on_cpu
from normwise.backends.protocol import Moments, NormConfig, NormRequest, NormResult, RunningStatsRequest, momentum_now
from normwise.ops._torch_internals import current_graph_task_id
from normwise.ops.dispatch import (
    have_values,
    is_traced_or_transformed,
    jit_traces,
    running_stats_kernel,
    values_visible,
)

# Whether running statistics were updated: a bool, or a 0-d bool tensor where a look at it would wait for a device or is
# not possible (while compiling).
Updated: TypeAlias = bool | Tensor


def kernel_for(request: NormRequest) -> Callable[[NormResult], Updated] | None:
    """What updates the running statistics of a BatchNorm in one launch, by the statistics that its forward kept, and
    counts the batch; None where torch's operations do it."""
    config, x, _, _, _, _, mean, var, tracked = request
    if mean is None or on_cpu(x) or config.family != "channels" or not config.batch_statistics:
        return None
    elements = x.numel() // x.shape[1] if x.numel() else 0
    wanted = RunningStatsRequest(mean, var, tracked, config.momentum, count=elements, eps=config.eps)  # type: ignore[arg-type]
    kernel = running_stats_kernel(wanted)
    if kernel is None:
        return None
    return lambda result: kernel(wanted._replace(mean=result.stats[0], rstd=result.stats[1]))  # type: ignore[index]


def update(request: NormRequest, result: NormResult) -> Updated:
    """Update the running statistics of a request by what its forward found, and count the batch."""
    stats = (request.running_mean, request.running_var, request.num_batches_tracked)
    if result.new_running is None:
        return update_from_moments(request.config, *stats, result.moments)  # type: ignore[arg-type]
    return _count(stats[2], store_if_finite(stats[:2], result.new_running))  # type: ignore[arg-type]


def update_from_moments(
    config: NormConfig,
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor | None,
    moments: Moments,
    correction: int = 1,
) -> Updated:
    """Update the running statistics of a norm by the moments of its batch, and count the batch."""
    momentum = config.momentum
    if config.family == "groups":
        assert momentum is not None
        update_over_samples(running_mean, running_var, moments, momentum)
        return True
    if correction == 1 and not on_cpu(running_mean):
        mean, var, count = (m.expand_as(moments.mean).reshape(running_mean.shape) for m in moments)
        wanted = RunningStatsRequest(running_mean, running_var, num_batches_tracked, momentum, mean, var, count)
        kernel = running_stats_kernel(wanted)
        if kernel is not None:
            updated: Updated = kernel(wanted)
            return updated
    momentum = momentum_now(momentum, num_batches_tracked, running_mean.dtype)
    updated = update_averages(running_mean, running_var, moments, momentum, correction)
    return _count(num_batches_tracked, updated)


def _count(num_batches_tracked: Tensor | None, updated: Updated) -> Updated:
    if num_batches_tracked is not None and updated is not False:
        num_batches_tracked.add_(1 if updated is True else updated)
    return updated


def is_recomputing() -> bool:
    """Whether this is a forward inside a backward: activation checkpointing runs a layer a second time on one batch.

    The first one has updated the running statistics. (A forward that user code starts inside a backward
    hook looks the same.) While compiling, checkpointing is the compiler's own and repeats no change of a buffer.
    """
    return not torch.compiler.is_compiling() and current_graph_task_id() != -1


def can_read(counter: Tensor) -> bool:
    """Whether the value of `counter` can be read, even if that waits for its device."""
    if not have_values(counter):
        return False
    return not (counter.is_cuda and torch.cuda.is_current_stream_capturing())


def can_read_now(counter: Tensor) -> bool:
    """Whether the value of `counter` can be read without waiting for a device."""
    return values_visible(counter) and not jit_traces()  # another when a traced graph runs


def update_averages(
    running_mean: Tensor, running_var: Tensor, moments: Moments, momentum: float | Tensor, correction: int = 1
) -> Updated:
    """running <- running + momentum * (batch - running), in place, with the sum of squares over count - correction.

    A channel without a valid element keeps its averages, and one with a single element, which has no deviation, its
    variance. If anything would become NaN or infinite, nothing is updated.

    Args:
        running_mean, running_var: (C,).
        moments: of one batch, with one element per channel once the kept axes are dropped.
        momentum: weight of the new batch.

    Returns:
        Whether they were updated.
    """
    with torch.no_grad():
        # Mean and variance side by side, since on a GPU each operation is a launch.
        old = torch.stack([running_mean, running_var])
        count = moments.count.expand_as(moments.mean).reshape(running_mean.shape)
        batch = torch.stack(
            [moments.mean.reshape(count.shape), corrected_var(moments, correction).reshape(count.shape)]
        )
        # More than half an element for a mean, and one and a half for a deviation: counts may be rounded.
        needed = torch.arange(0.5, 2, device=count.device)[:, None]
        new = torch.where(count > needed, _interpolate(old, batch, momentum), old)
        return store_if_finite((running_mean, running_var), new)


def store_if_finite(averages: tuple[Tensor, Tensor], new: Tensor | tuple[Tensor, Tensor]) -> Updated:
    """Store `new`, two tensors or one of (2, C), in the running averages, both or, where anything in it is NaN or
    infinite, none of them."""
    require_writable(*averages)
    if torch.compiler.is_compiling() and not isinstance(new, Tensor):
        return _store_if_finite_compiling(averages, new)
    with torch.no_grad():
        # In the averages' own dtype, in which a finite number may have become infinite.
        if isinstance(new, Tensor):
            rows = new.to(averages[0].dtype)
        else:
            rows = torch.stack([now.to(old.dtype) for old, now in zip(averages, new, strict=True)])
        if values_visible(rows) and not is_traced_or_transformed():
            if (rows * 0).sum() != 0:  # 0 * NaN and 0 * inf are NaN
                return False
            for old, now in zip(averages, rows, strict=True):
                old.copy_(now)
            return True
        # The fewest launches that torch's operations come to: see docs/gpu-launches.md.
        finite: Tensor = torch.linalg.vector_norm(rows, math.inf) < math.inf
        for old, now in zip(averages, rows, strict=True):
            if _is_eager(old):
                torch.where(finite, now, old, out=old)
            else:
                old.copy_(torch.where(finite, now, old))
        return finite


def _store_if_finite_compiling(averages: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]) -> Tensor:
    """`store_if_finite` for a compiler, which fuses one maximum over channels into what makes `new`; stacked, they
    would become a buffer of their own, written and read between barriers of all threads."""
    with torch.no_grad():
        mean, var = (now.to(old.dtype) for old, now in zip(averages, new, strict=True))
        finite = torch.maximum(mean.abs(), var.abs()).amax() < math.inf  # NaN is the largest
        for old, now in zip(averages, (mean, var), strict=True):
            old.copy_(torch.where(finite, now, old))
        return finite


def _is_eager(t: Tensor) -> bool:
    """Whether an operation may write its result to `t` itself, which saves a launch and which only torch's own tensors
    in eager mode know how to do."""
    return have_values(t) and type(t) in (Tensor, torch.nn.Parameter) and not is_traced_or_transformed()


def can_keep(flag: Tensor) -> bool:
    """Whether `flag` still holds its value when somebody looks at it later: not what a CUDA graph will write again."""
    return _is_eager(flag) and not (flag.is_cuda and torch.cuda.is_current_stream_capturing())


def require_writable(*averages: Tensor) -> None:
    """RuntimeError for a running average that cannot be written, before the other one is updated."""
    for t in averages:
        if t.numel() > 1 and 0 in t.stride():
            raise RuntimeError(
                "unsupported operation: more than one element of the written-to tensor refers to a single memory "
                f"location: a running average of shape {tuple(t.shape)} is expanded, but updated in place: clone() it"
            )


def update_over_samples(running_mean: Tensor, running_var: Tensor, moments: Moments, momentum: float | Tensor) -> None:
    """`update_averages` by the average over samples (axis 0) of each sample's own moments.

    A sample without a valid element has no mean, and one with a single element no deviation: they are left out of
    the average, as are samples whose moments are NaN or infinite. Where no sample is left, the running average stays.
    """
    require_writable(running_mean, running_var)
    if not on_cpu(running_mean):
        mean, var, count = (m.expand_as(moments.mean).reshape(-1, *running_mean.shape) for m in moments)
        wanted = RunningStatsRequest(running_mean, running_var, None, momentum, mean, var, count)
        kernel = running_stats_kernel(wanted, "update_over_samples")
        if kernel is not None:
            kernel(wanted)
            return
    with torch.no_grad():
        var = corrected_var(moments)
        finite = moments.mean.isfinite() & var.isfinite()
        for running, new, needed in ((running_mean, moments.mean, 1), (running_var, var, 2)):
            usable = (moments.count >= needed) & finite
            samples = usable.sum(0).to(new.dtype).reshape(running.shape)
            average = torch.where(usable, new, 0).sum(0).reshape(running.shape) / samples.clamp(min=1)
            running.copy_(torch.where(samples > 0, _interpolate(running, average, momentum), running))


def _interpolate(running: Tensor, new: Tensor, momentum: float | Tensor) -> Tensor:
    """The next running average in the wider dtype, so that one of half precision is rounded once, when stored."""
    wide = torch.promote_types(running.dtype, new.dtype)
    weight = momentum.to(wide) if isinstance(momentum, Tensor) else momentum
    return torch.lerp(running.to(wide), new.to(wide), weight)


def corrected_var(moments: Moments, correction: int = 1) -> Tensor:
    """The variance divided by count - correction instead of count: unbiased with 1, torch's convention for running
    averages; biased with 0, that of Keras and Flax."""
    return moments.var * (moments.count / (moments.count - correction).clamp(min=1)) if correction else moments.var
