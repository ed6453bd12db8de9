"""Running averages: of a BatchNorm guarded and moved, and the batch counted, by one program, since all channels decide;
of an InstanceNorm moved by the average over the samples that have moments."""

from __future__ import annotations

import triton
import triton.language as tl

from normwise.backends.triton.kernels.common import in_dtype_of


@triton.jit
def _moved(batch, counts, running, c, channels, momentum, elements, count_stride, EPS: tl.constexpr,
           OF_VARIANCE: tl.constexpr):  # fmt: skip
    """The next running averages, as they would be stored. `batch`: means, variances or, with EPS, 1 / sqrt(var + EPS).
    A channel without a valid element keeps its averages, and one with a single element its variance, which is unbiased.
    More than half an element for a mean, and one and a half for a deviation: counts may be rounded."""
    old = tl.load(running + c, mask=c < channels, other=0).to(tl.float64)
    now = tl.load(batch + c, mask=c < channels, other=1).to(tl.float64)
    if counts is None:
        count = (elements + tl.zeros_like(c)).to(tl.float64)
    else:
        count = tl.load(counts + c * count_stride, mask=c < channels, other=0).to(tl.float64)
    if OF_VARIANCE:
        if EPS is not None:
            now = 1.0 / (now * now) - EPS
            now = tl.where(now < 0, 0.0, now)  # of a variance near 0 the rounding is left; NaN stays
        now = now * (count / tl.maximum(count - 1.0, 1.0))
        now = tl.where(count > 1.5, old + momentum * (now - old), old)
    else:
        now = tl.where(count > 0.5, old + momentum * (now - old), old)
    return in_dtype_of(running, now)


@triton.jit
def _weight(momentum, momentum_rest, momentum_tensor):
    """In float64, of which a number has come in two floats."""
    if momentum_tensor is not None:
        weight = tl.load(momentum_tensor).to(tl.float64)
    else:
        weight = tl.sum((momentum + tl.zeros([1], tl.float64)) + momentum_rest, 0)
    return weight


@triton.jit
def update_running(
    means, spreads, counts, running_mean, running_var, num_batches_tracked, momentum_tensor, updated, channels,
    elements, count_stride, momentum, momentum_rest, EPS: tl.constexpr, CUMULATIVE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Move the running averages and count the batch, unless anything would become NaN or infinite; `updated` says
    whether. `spreads`: see `_moved`. Each channel has `elements`, or what `counts` says.

    The momentum is momentum + momentum_rest, or the tensor, or, CUMULATIVE, 1 / (num_batches_tracked + 1)."""
    if CUMULATIVE:
        weight = 1.0 / (tl.load(num_batches_tracked).to(tl.float64) + 1.0)
    else:
        weight = _weight(momentum, momentum_rest, momentum_tensor)
    check = tl.sum(tl.zeros([BLOCK], tl.float64), 0)
    for start in range(0, channels, BLOCK):
        c = start + tl.arange(0, BLOCK).to(tl.int64)
        new_mean = _moved(means, counts, running_mean, c, channels, weight, elements, count_stride, EPS, False)
        new_var = _moved(spreads, counts, running_var, c, channels, weight, elements, count_stride, EPS, True)
        check += tl.sum(new_mean.to(tl.float64) * 0.0 + new_var.to(tl.float64) * 0.0, 0)  # 0 * NaN and 0 * inf are NaN
    finite = check == 0
    end = tl.where(finite, channels, 0)
    for start in range(0, channels, BLOCK):
        c = start + tl.arange(0, BLOCK).to(tl.int64)
        new_mean = _moved(means, counts, running_mean, c, channels, weight, elements, count_stride, EPS, False)
        new_var = _moved(spreads, counts, running_var, c, channels, weight, elements, count_stride, EPS, True)
        tl.store(running_mean + c, new_mean, mask=c < end)
        tl.store(running_var + c, new_var, mask=c < end)
    if num_batches_tracked is not None:
        tl.debug_barrier()  # another warp may not have read it yet
        tl.store(num_batches_tracked, tl.load(num_batches_tracked) + finite.to(tl.int64))
    tl.store(updated, finite.to(tl.uint8))


@triton.jit
def _move_by_average(running, c, there, total, having, weight):
    old = tl.load(running + c, mask=there, other=0).to(tl.float64)
    now = old + weight * (total / tl.maximum(having, 1.0) - old)
    tl.store(running + c, in_dtype_of(running, tl.where(having > 0.5, now, old)), mask=there)


@triton.jit
def update_running_over_samples(
    means, variances, counts, running_mean, running_var, momentum_tensor, samples, channels, count_strides_0,
    count_strides_1, momentum, momentum_rest, BLOCK: tl.constexpr,
):  # fmt: skip
    """Move the running averages of a block of channels by the average over samples of their own moments, (samples,
    channels): of those that are finite and of an element, or for the variance, made unbiased, of two. Where no sample
    is left a running average stays."""
    c = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = c < channels
    zero = tl.zeros([BLOCK], tl.float64)
    mean_total = zero
    means_there = zero
    var_total = zero
    vars_there = zero
    for sample in range(samples):
        at = tl.cast(sample, tl.int64) * channels + c
        mean = tl.load(means + at, mask=there, other=0).to(tl.float64)
        var = tl.load(variances + at, mask=there, other=0).to(tl.float64)
        count = tl.load(counts + sample * count_strides_0 + c * count_strides_1, mask=there, other=0).to(tl.float64)
        var = var * (count / tl.maximum(count - 1.0, 1.0))
        finite = (mean * 0.0 + var * 0.0) == 0.0  # 0 * NaN and 0 * inf are NaN
        has_mean = finite & (count > 0.5)
        has_var = finite & (count > 1.5)
        mean_total += tl.where(has_mean, mean, 0.0)
        means_there += tl.where(has_mean, 1.0, 0.0)
        var_total += tl.where(has_var, var, 0.0)
        vars_there += tl.where(has_var, 1.0, 0.0)
    weight = _weight(momentum, momentum_rest, momentum_tensor)
    _move_by_average(running_mean, c, there, mean_total, means_there, weight)
    _move_by_average(running_var, c, there, var_total, vars_there, weight)
