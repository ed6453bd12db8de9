"""What all kernels of a recurrent step have in common: its gates, as four tensors of units, of which those that the
cell has not are zeros and cost nothing; and norms of them, whose groups of gates share statistics.

The tensors are one row of units, or a tile of rows (rows, units). Columns and their mask are (units,) or (1, units).
"""

from __future__ import annotations

import triton
import triton.language as tl


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
def load_gates(ptr, offset, UNITS: tl.constexpr, cols, mask, GATES: tl.constexpr, WIDE: tl.constexpr):
    a = tl.load(ptr + offset + cols, mask, other=0).to(WIDE)
    b = tl.zeros_like(a)
    c = tl.zeros_like(a)
    d = tl.zeros_like(a)
    if GATES > 1:
        b = tl.load(ptr + offset + UNITS + cols, mask, other=0).to(WIDE)
        c = tl.load(ptr + offset + 2 * UNITS + cols, mask, other=0).to(WIDE)
    if GATES > 3:
        d = tl.load(ptr + offset + 3 * UNITS + cols, mask, other=0).to(WIDE)
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


@triton.jit
def standardize(
    v,
    UNITS: tl.constexpr,
    mask,
    EPS: tl.constexpr,
    GATES: tl.constexpr,
    GROUPS: tl.constexpr,
    COUNTS: tl.constexpr,
    CENTER: tl.constexpr,
):
    """(v - mean) / sqrt(var + eps) by groups of gates, and 1 / sqrt(var + eps)."""
    a, b, c, d = v
    if CENTER:
        mean = means(v, UNITS, GATES, GROUPS, COUNTS)
        a = tl.where(mask, a - mean[0], 0)
        b = tl.where(mask, b - mean[1], 0)
        c = tl.where(mask, c - mean[2], 0)
        d = tl.where(mask, d - mean[3], 0)
    var = means((a * a, b * b, c * c, d * d), UNITS, GATES, GROUPS, COUNTS)
    ra = 1.0 / tl.sqrt(var[0] + EPS)
    rb = 1.0 / tl.sqrt(var[1] + EPS)
    rc = 1.0 / tl.sqrt(var[2] + EPS)
    rd = 1.0 / tl.sqrt(var[3] + EPS)
    return (a * ra, b * rb, c * rc, d * rd), (ra, rb, rc, rd)


@triton.jit
def standardize_backward(
    dy,
    normed,
    rstd,
    UNITS: tl.constexpr,
    mask,
    GATES: tl.constexpr,
    GROUPS: tl.constexpr,
    COUNTS: tl.constexpr,
    CENTER: tl.constexpr,
):
    """The gradient of v from that of its `normed` values."""
    along = means(times(dy, normed), UNITS, GATES, GROUPS, COUNTS)
    a = dy[0] - normed[0] * along[0]
    b = dy[1] - normed[1] * along[1]
    c = dy[2] - normed[2] * along[2]
    d = dy[3] - normed[3] * along[3]
    if CENTER:
        mean = means(dy, UNITS, GATES, GROUPS, COUNTS)
        a = tl.where(mask, a - mean[0], 0)
        b = tl.where(mask, b - mean[1], 0)
        c = tl.where(mask, c - mean[2], 0)
        d = tl.where(mask, d - mean[3], 0)
    return a * rstd[0], b * rstd[1], c * rstd[2], d * rstd[3]


@triton.jit
def terms(
    p,
    q,
    bias_ih,
    bias_hh,
    gain_ih,
    gain_hh,
    gain_sum,
    bias_inner,
    UNITS: tl.constexpr,
    cols,
    mask,
    EPS: tl.constexpr,
    GATES: tl.constexpr,
    GROUPS: tl.constexpr,
    COUNTS: tl.constexpr,
    CENTER: tl.constexpr,
    WIDE: tl.constexpr,
):
    """p = W_ih x and q = W_hh h -> the input term, the hidden term, and for each of both what its norm made of it and
    its 1 / sqrt(var + eps). With a norm over the sum the whole is the input term, the hidden term is 0, and its norm is
    that of both."""
    one = row_sum(p[0]) * 0 + 1
    p_rstd = (one, one, one, one)
    q_rstd = p_rstd
    p_normed = p
    q_normed = q
    if gain_sum is not None:
        summed = with_bias(plus(p, q), bias_inner, UNITS, cols, mask, GATES, WIDE)
        p_normed, p_rstd = standardize(summed, UNITS, mask, EPS, GATES, GROUPS, COUNTS, CENTER)
        q_normed = p_normed
        q_rstd = p_rstd
        p = times(p_normed, load_gates(gain_sum, 0, UNITS, cols, mask, GATES, WIDE))
        p = with_bias(p, bias_hh, UNITS, cols, mask, GATES, WIDE)
        nothing = tl.zeros_like(p[0])
        q = (nothing, nothing, nothing, nothing)
    else:
        if gain_ih is not None:
            p_normed, p_rstd = standardize(p, UNITS, mask, EPS, GATES, GROUPS, COUNTS, CENTER)
            p = times(p_normed, load_gates(gain_ih, 0, UNITS, cols, mask, GATES, WIDE))
        if gain_hh is not None:
            q_normed, q_rstd = standardize(q, UNITS, mask, EPS, GATES, GROUPS, COUNTS, CENTER)
            q = times(q_normed, load_gates(gain_hh, 0, UNITS, cols, mask, GATES, WIDE))
        q = with_bias(q, bias_hh, UNITS, cols, mask, GATES, WIDE)
    p = with_bias(p, bias_ih, UNITS, cols, mask, GATES, WIDE)
    return p, q, p_normed, p_rstd, q_normed, q_rstd


@triton.jit
def hidden_backward(
    d,
    q_normed,
    q_rstd,
    gain_hh,
    gain_sum,
    UNITS: tl.constexpr,
    cols,
    mask,
    GATES: tl.constexpr,
    GROUPS: tl.constexpr,
    COUNTS: tl.constexpr,
    CENTER: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The gradient of q from that of the hidden term, or of the sum where its norm is over that."""
    if gain_sum is not None:
        d = times(d, load_gates(gain_sum, 0, UNITS, cols, mask, GATES, WIDE))
        d = standardize_backward(d, q_normed, q_rstd, UNITS, mask, GATES, GROUPS, COUNTS, CENTER)
    elif gain_hh is not None:
        d = times(d, load_gates(gain_hh, 0, UNITS, cols, mask, GATES, WIDE))
        d = standardize_backward(d, q_normed, q_rstd, UNITS, mask, GATES, GROUPS, COUNTS, CENTER)
    return d


@triton.jit
def input_backward(
    d,
    dq,
    p_normed,
    p_rstd,
    gain_ih,
    gain_sum,
    UNITS: tl.constexpr,
    cols,
    mask,
    GATES: tl.constexpr,
    GROUPS: tl.constexpr,
    COUNTS: tl.constexpr,
    CENTER: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The gradient of p from that of the input term; it is `dq`, that of q, where one norm is over the sum."""
    if gain_sum is not None:
        d = dq
    elif gain_ih is not None:
        d = times(d, load_gates(gain_ih, 0, UNITS, cols, mask, GATES, WIDE))
        d = standardize_backward(d, p_normed, p_rstd, UNITS, mask, GATES, GROUPS, COUNTS, CENTER)
    return d


@triton.jit
def add_sums(
    sums,
    d,
    d_hidden,
    dq,
    p_normed,
    q_normed,
    dshown,
    cell_normed,
    bias_ih,
    bias_hh,
    gain_ih,
    gain_hh,
    gain_sum,
    bias_inner,
    gain_c,
    bias_c,
    UNITS: tl.constexpr,
    cols,
    mask,
    CELL: tl.constexpr,
    GATES: tl.constexpr,
    RESET_AFTER: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One row's share of the gradients of gains and biases, added to the sums of `rnn.requests.SUMS`: from the
    gradients of the input term (or the sum) `d`, of the hidden term, and of what the cell shows to its output."""
    if bias_ih is not None or bias_hh is not None:
        add_gates(sums, 0, UNITS, cols, mask, d, GATES, WIDE)
        if CELL == "gru" and RESET_AFTER:
            at = sums + 3 * GATES * UNITS + cols
            tl.store(at, tl.load(at, mask, other=0) + d_hidden[2], mask)
    if gain_sum is not None:
        add_gates(sums, GATES * UNITS, UNITS, cols, mask, times(d, p_normed), GATES, WIDE)
        if bias_inner is not None:
            add_gates(sums, 2 * GATES * UNITS, UNITS, cols, mask, dq, GATES, WIDE)
    else:
        if gain_hh is not None:
            add_gates(sums, GATES * UNITS, UNITS, cols, mask, times(d_hidden, q_normed), GATES, WIDE)
        if gain_ih is not None:
            add_gates(sums, 2 * GATES * UNITS, UNITS, cols, mask, times(d, p_normed), GATES, WIDE)
    if gain_c is not None:
        at = sums + (3 * GATES + 1) * UNITS + cols
        tl.store(at, tl.load(at, mask, other=0) + dshown * cell_normed, mask)
        if bias_c is not None:
            at += UNITS
            tl.store(at, tl.load(at, mask, other=0) + dshown, mask)
