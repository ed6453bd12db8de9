"""The input and the hidden term of a recurrent step, with their norms, whose groups of gates share statistics: forward
and backward, of gates as in `gates`.

A norm's statistics, and what its backward takes from a gradient, are computed apart from their use: where several
programs share a row, they put both together from what each of them has.
"""

from __future__ import annotations

import triton
import triton.language as tl

from normwise.backends.triton.kernels.gates import load_gates, means, plus, row_sum, times, with_bias


@triton.jit
def centred(v, mean, mask, CENTER: tl.constexpr):
    """v - mean, of tensors that are and stay 0 beyond the last unit; v where the norm does not centre."""
    a, b, c, d = v
    if CENTER:
        a = tl.where(mask, a - mean[0], 0)
        b = tl.where(mask, b - mean[1], 0)
        c = tl.where(mask, c - mean[2], 0)
        d = tl.where(mask, d - mean[3], 0)
    return a, b, c, d


@triton.jit
def normed(v, mean, rstd, mask, CENTER: tl.constexpr):
    return times(centred(v, mean, mask, CENTER), rstd)


@triton.jit
def reciprocal_deviations(var, EPS: tl.constexpr):
    ra = 1.0 / tl.sqrt(var[0] + EPS)
    rb = 1.0 / tl.sqrt(var[1] + EPS)
    rc = 1.0 / tl.sqrt(var[2] + EPS)
    rd = 1.0 / tl.sqrt(var[3] + EPS)
    return ra, rb, rc, rd


@triton.jit
def statistics(
    v,
    UNITS: tl.constexpr,
    mask,
    EPS: tl.constexpr,
    GATES: tl.constexpr,
    GROUPS: tl.constexpr,
    COUNTS: tl.constexpr,
    CENTER: tl.constexpr,
):
    """By groups of gates the mean (which only a norm that centres has) and 1 / sqrt(var + eps)."""
    zero = row_sum(v[0]) * 0
    mean = (zero, zero, zero, zero)
    if CENTER:
        mean = means(v, UNITS, GATES, GROUPS, COUNTS)
    v = centred(v, mean, mask, CENTER)
    return mean, reciprocal_deviations(means(times(v, v), UNITS, GATES, GROUPS, COUNTS), EPS)


@triton.jit
def projections(
    dy,
    normed,
    UNITS: tl.constexpr,
    GATES: tl.constexpr,
    GROUPS: tl.constexpr,
    COUNTS: tl.constexpr,
    CENTER: tl.constexpr,
):
    """What the backward of a norm takes from the gradient of its `normed` values: by groups of gates how far that goes
    along them, and its mean (which only a norm that centres has)."""
    along = means(times(dy, normed), UNITS, GATES, GROUPS, COUNTS)
    mean = along
    if CENTER:
        mean = means(dy, UNITS, GATES, GROUPS, COUNTS)
    return along, mean


@triton.jit
def projected(dy, normed, rstd, along, mean, mask, CENTER: tl.constexpr):
    """The gradient of v from that of its `normed` values."""
    a = dy[0] - normed[0] * along[0]
    b = dy[1] - normed[1] * along[1]
    c = dy[2] - normed[2] * along[2]
    d = dy[3] - normed[3] * along[3]
    return times(centred((a, b, c, d), mean, mask, CENTER), rstd)


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
    along, mean = projections(dy, normed, UNITS, GATES, GROUPS, COUNTS, CENTER)
    return projected(dy, normed, rstd, along, mean, mask, CENTER)


@triton.jit
def normalized_terms(
    p, q, gain_sum, bias_inner, UNITS: tl.constexpr, cols, mask, GATES: tl.constexpr, WIDE: tl.constexpr
):
    """What norms are over: p and q, or in the place of p their sum."""
    if gain_sum is not None:
        p = with_bias(plus(p, q), bias_inner, UNITS, cols, mask, GATES, WIDE)
    return p, q


@triton.jit
def terms_of(
    p,
    q,
    p_mean,
    p_rstd,
    q_mean,
    q_rstd,
    bias_ih,
    bias_hh,
    gain_ih,
    gain_hh,
    gain_sum,
    UNITS: tl.constexpr,
    cols,
    mask,
    GATES: tl.constexpr,
    CENTER: tl.constexpr,
    WIDE: tl.constexpr,
):
    """What `normalized_terms` gave and its statistics -> the input term, the hidden term, and what the norms made of
    each. With a norm over the sum the whole is the input term, the hidden term is 0, and the norm is that of both."""
    p_normed = p
    q_normed = q
    if gain_sum is not None:
        p_normed = normed(p, p_mean, p_rstd, mask, CENTER)
        q_normed = p_normed
        p = times(p_normed, load_gates(gain_sum, 0, UNITS, cols, mask, GATES, WIDE))
        p = with_bias(p, bias_hh, UNITS, cols, mask, GATES, WIDE)
        nothing = tl.zeros_like(p[0])
        q = (nothing, nothing, nothing, nothing)
    else:
        if gain_ih is not None:
            p_normed = normed(p, p_mean, p_rstd, mask, CENTER)
            p = times(p_normed, load_gates(gain_ih, 0, UNITS, cols, mask, GATES, WIDE))
        if gain_hh is not None:
            q_normed = normed(q, q_mean, q_rstd, mask, CENTER)
            q = times(q_normed, load_gates(gain_hh, 0, UNITS, cols, mask, GATES, WIDE))
        q = with_bias(q, bias_hh, UNITS, cols, mask, GATES, WIDE)
    p = with_bias(p, bias_ih, UNITS, cols, mask, GATES, WIDE)
    return p, q, p_normed, q_normed


@triton.jit
def statistics_of_terms(
    p,
    q,
    gain_ih,
    gain_hh,
    gain_sum,
    UNITS: tl.constexpr,
    mask,
    EPS: tl.constexpr,
    GATES: tl.constexpr,
    GROUPS: tl.constexpr,
    COUNTS: tl.constexpr,
    CENTER: tl.constexpr,
):
    """Of what `normalized_terms` gave: mean and 1 / sqrt(var + eps) of p (or the sum) and of q; those of a norm over
    the sum twice; 1 where there is no norm."""
    one = row_sum(p[0]) * 0 + 1
    p_mean = (one, one, one, one)
    p_rstd = p_mean
    q_mean = p_mean
    q_rstd = p_mean
    if gain_sum is not None:
        p_mean, p_rstd = statistics(p, UNITS, mask, EPS, GATES, GROUPS, COUNTS, CENTER)
        q_mean = p_mean
        q_rstd = p_rstd
    else:
        if gain_ih is not None:
            p_mean, p_rstd = statistics(p, UNITS, mask, EPS, GATES, GROUPS, COUNTS, CENTER)
        if gain_hh is not None:
            q_mean, q_rstd = statistics(q, UNITS, mask, EPS, GATES, GROUPS, COUNTS, CENTER)
    return p_mean, p_rstd, q_mean, q_rstd


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
    its 1 / sqrt(var + eps): see `terms_of`."""
    p, q = normalized_terms(p, q, gain_sum, bias_inner, UNITS, cols, mask, GATES, WIDE)
    p_mean, p_rstd, q_mean, q_rstd = statistics_of_terms(
        p, q, gain_ih, gain_hh, gain_sum, UNITS, mask, EPS, GATES, GROUPS, COUNTS, CENTER
    )
    p, q, p_normed, q_normed = terms_of(
        p,
        q,
        p_mean,
        p_rstd,
        q_mean,
        q_rstd,
        bias_ih,
        bias_hh,
        gain_ih,
        gain_hh,
        gain_sum,
        UNITS,
        cols,
        mask,
        GATES,
        CENTER,
        WIDE,
    )
    return p, q, p_normed, p_rstd, q_normed, q_rstd


@triton.jit
def times_gain(d, gain_hh, gain_sum, UNITS: tl.constexpr, cols, mask, GATES: tl.constexpr, WIDE: tl.constexpr):
    """The gradient of the hidden term (or the sum) -> that of its normed values."""
    if gain_sum is not None:
        d = times(d, load_gates(gain_sum, 0, UNITS, cols, mask, GATES, WIDE))
    elif gain_hh is not None:
        d = times(d, load_gates(gain_hh, 0, UNITS, cols, mask, GATES, WIDE))
    return d


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
    if gain_sum is not None or gain_hh is not None:
        d = times_gain(d, gain_hh, gain_sum, UNITS, cols, mask, GATES, WIDE)
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
