"""What all kernels of a recurrent step have in common: its gates, as four tensors of units, of which those that the
cell has not are zeros and cost nothing, and their means over groups of gates.

The tensors are one row of units, or a tile of rows (rows, units). Columns and their mask are (units,) or (1, units).
"""

from __future__ import annotations

import triton
import triton.language as tl

NO_MODIFIER = tl.constexpr("")


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    """From exp, and by its series where 1 - exp(-2 |x|) would lose digits."""
    size = tl.abs(x)
    e = tl.exp(-2.0 * size)
    far = (1.0 - e) / (1.0 + e)
    far = tl.where(x < 0, -far, far)
    if x.dtype != tl.float64:
        s = x * x
        series = x * (1.0 + s * (-0.33333333 + s * (0.13333333 + s * (-0.05396825 + s * 0.02186949))))
        far = tl.where(size < 0.25, series, far)
    return far


@triton.jit
def row_sum(v):
    """Over the units: a number, or one a row (rows, 1)."""
    if len(v.shape) == 1:
        return tl.sum(v, 0)
    else:
        return tl.sum(v, 1)[:, None]


@triton.jit
def load_gates(
    ptr,
    offset,
    UNITS: tl.constexpr,
    cols,
    mask,
    GATES: tl.constexpr,
    WIDE: tl.constexpr,
    CACHE: tl.constexpr = NO_MODIFIER,
):
    a = tl.load(ptr + offset + cols, mask, other=0, cache_modifier=CACHE).to(WIDE)
    b = tl.zeros_like(a)
    c = tl.zeros_like(a)
    d = tl.zeros_like(a)
    if GATES > 1:
        b = tl.load(ptr + offset + UNITS + cols, mask, other=0, cache_modifier=CACHE).to(WIDE)
        c = tl.load(ptr + offset + 2 * UNITS + cols, mask, other=0, cache_modifier=CACHE).to(WIDE)
    if GATES > 3:
        d = tl.load(ptr + offset + 3 * UNITS + cols, mask, other=0, cache_modifier=CACHE).to(WIDE)
    return a, b, c, d


@triton.jit
def store_gates(ptr, offset, UNITS: tl.constexpr, cols, mask, v, GATES: tl.constexpr):
    tl.store(ptr + offset + cols, v[0].to(ptr.dtype.element_ty), mask)
    if GATES > 1:
        tl.store(ptr + offset + UNITS + cols, v[1].to(ptr.dtype.element_ty), mask)
        tl.store(ptr + offset + 2 * UNITS + cols, v[2].to(ptr.dtype.element_ty), mask)
    if GATES > 3:
        tl.store(ptr + offset + 3 * UNITS + cols, v[3].to(ptr.dtype.element_ty), mask)


@triton.jit
def add_gates(ptr, offset, UNITS: tl.constexpr, cols, mask, v, GATES: tl.constexpr, WIDE: tl.constexpr):
    """ptr += v, in memory that no other program touches."""
    store_gates(ptr, offset, UNITS, cols, mask, plus(load_gates(ptr, offset, UNITS, cols, mask, GATES, WIDE), v), GATES)


@triton.jit
def plus(a, b):
    return a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3]


@triton.jit
def less(a, b, share):
    return a[0] - b[0] * share, a[1] - b[1] * share, a[2] - b[2] * share, a[3] - b[3] * share


@triton.jit
def times(a, b):
    return a[0] * b[0], a[1] * b[1], a[2] * b[2], a[3] * b[3]


@triton.jit
def with_bias(v, ptr, UNITS: tl.constexpr, cols, mask, GATES: tl.constexpr, WIDE: tl.constexpr):
    if ptr is not None:
        v = plus(v, load_gates(ptr, 0, UNITS, cols, mask, GATES, WIDE))
    return v


@triton.jit
def mean_of_group(sums, UNITS: tl.constexpr, K: tl.constexpr, GROUPS: tl.constexpr, COUNTS: tl.constexpr):
    """The mean over all gates that share gate K's statistics: two bits of GROUPS name each gate's group, three bits of
    COUNTS how many gates that has."""
    total = sums[K]
    own: tl.constexpr = (GROUPS >> (2 * K)) & 3
    if K != 0 and own == (GROUPS & 3):
        total += sums[0]
    if K != 1 and own == ((GROUPS >> 2) & 3):
        total += sums[1]
    if K != 2 and own == ((GROUPS >> 4) & 3):
        total += sums[2]
    if K != 3 and own == ((GROUPS >> 6) & 3):
        total += sums[3]
    return total / (((COUNTS >> (3 * K)) & 7) * UNITS)


@triton.jit
def means(v, UNITS: tl.constexpr, GATES: tl.constexpr, GROUPS: tl.constexpr, COUNTS: tl.constexpr):
    """For each gate the mean over its group, of tensors that are 0 beyond the last unit."""
    first = row_sum(v[0])
    if GATES == 1:
        mean = first / UNITS
        return mean, mean, mean, mean
    last = first * 0
    if GATES > 3:
        last = row_sum(v[3])
    sums = (first, row_sum(v[1]), row_sum(v[2]), last)
    a = mean_of_group(sums, UNITS, 0, GROUPS, COUNTS)
    b = mean_of_group(sums, UNITS, 1, GROUPS, COUNTS)
    c = mean_of_group(sums, UNITS, 2, GROUPS, COUNTS)
    d = c
    if GATES > 3:
        d = mean_of_group(sums, UNITS, 3, GROUPS, COUNTS)
    return a, b, c, d
