"""Running averages of a BatchNorm, guarded and moved, and the batch counted: one program, since all channels decide."""

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
def update_running(
    means, spreads, counts, running_mean, running_var, num_batches_tracked, momentum_tensor, updated, channels,
    elements, count_stride, momentum, momentum_rest, EPS: tl.constexpr, CUMULATIVE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Move the running averages and count the batch, unless anything would become NaN or infinite; `updated` says
    whether. `spreads`: see `_moved`. Each channel has `elements`, or what `counts` says.

    The momentum is momentum + momentum_rest, or the tensor, or, CUMULATIVE, 1 / (num_batches_tracked + 1)."""
    if CUMULATIVE:
        weight = 1.0 / (tl.load(num_batches_tracked).to(tl.float64) + 1.0)
    elif momentum_tensor is not None:
        weight = tl.load(momentum_tensor).to(tl.float64)
    else:
        weight = (momentum + tl.zeros([1], tl.float64)) + momentum_rest
        weight = tl.sum(weight, 0)
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
