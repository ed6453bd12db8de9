"""The cell of a recurrent layer, one step of all samples a launch, forward and backward.

One program computes one sample's row, so that its statistics need no other program and no sum depends on the order in
which programs run. A row's gates are kept as four vectors of units (those that the cell has not are zeros, and cost
nothing). Everything is computed in `WIDE`: float32, or float64 for float64.

Rows of a step are `p` = W_ih x, `q` = W_hh h and the states before the step, all as in `Recurrence`'s equations. States
before a step are stored by the step before it, zeroed where the step is reset; those of a sequence that ends go to the
final states.
"""

from __future__ import annotations

import triton.language as tl

import triton

# What changes from step to step, of which no value is worth a compilation.
_OF_FORWARD = ("row", "next_row", "state_row", "next_state_row", "wide_row", "next_wide_row", "alive_next")
_OF_BACKWARD = ("row", "next_row", "alive_next")


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _tanh(x):
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
def _load_gates(ptr, offset, UNITS: tl.constexpr, cols, mask, GATES: tl.constexpr, WIDE: tl.constexpr):
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
def _store_gates(ptr, offset, UNITS: tl.constexpr, cols, mask, v, GATES: tl.constexpr):
    tl.store(ptr + offset + cols, v[0].to(ptr.dtype.element_ty), mask)
    if GATES > 1:
        tl.store(ptr + offset + UNITS + cols, v[1].to(ptr.dtype.element_ty), mask)
        tl.store(ptr + offset + 2 * UNITS + cols, v[2].to(ptr.dtype.element_ty), mask)
    if GATES > 3:
        tl.store(ptr + offset + 3 * UNITS + cols, v[3].to(ptr.dtype.element_ty), mask)


@triton.jit
def _add_gates(ptr, offset, UNITS: tl.constexpr, cols, mask, v, GATES: tl.constexpr, WIDE: tl.constexpr):
    """ptr += v, in memory that no other program touches."""
    _store_gates(
        ptr, offset, UNITS, cols, mask, _plus(_load_gates(ptr, offset, UNITS, cols, mask, GATES, WIDE), v), GATES
    )


@triton.jit
def _plus(a, b):
    return a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3]


@triton.jit
def _times(a, b):
    return a[0] * b[0], a[1] * b[1], a[2] * b[2], a[3] * b[3]


@triton.jit
def _with_bias(v, ptr, UNITS: tl.constexpr, cols, mask, GATES: tl.constexpr, WIDE: tl.constexpr):
    if ptr is not None:
        v = _plus(v, _load_gates(ptr, 0, UNITS, cols, mask, GATES, WIDE))
    return v


@triton.jit
def _mean_of_group(sums, UNITS: tl.constexpr, K: tl.constexpr, GROUPS: tl.constexpr, COUNTS: tl.constexpr):
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
def _means(v, UNITS: tl.constexpr, GATES: tl.constexpr, GROUPS: tl.constexpr, COUNTS: tl.constexpr):
    """For each gate the mean over its group, of vectors that are 0 beyond the last unit."""
    first = tl.sum(v[0], 0)
    if GATES == 1:
        mean = first / UNITS
        return mean, mean, mean, mean
    last = first * 0
    if GATES > 3:
        last = tl.sum(v[3], 0)
    sums = (first, tl.sum(v[1], 0), tl.sum(v[2], 0), last)
    a = _mean_of_group(sums, UNITS, 0, GROUPS, COUNTS)
    b = _mean_of_group(sums, UNITS, 1, GROUPS, COUNTS)
    c = _mean_of_group(sums, UNITS, 2, GROUPS, COUNTS)
    d = c
    if GATES > 3:
        d = _mean_of_group(sums, UNITS, 3, GROUPS, COUNTS)
    return a, b, c, d


@triton.jit
def _standardize(
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
        mean = _means(v, UNITS, GATES, GROUPS, COUNTS)
        a = tl.where(mask, a - mean[0], 0)
        b = tl.where(mask, b - mean[1], 0)
        c = tl.where(mask, c - mean[2], 0)
        d = tl.where(mask, d - mean[3], 0)
    var = _means((a * a, b * b, c * c, d * d), UNITS, GATES, GROUPS, COUNTS)
    ra = 1.0 / tl.sqrt(var[0] + EPS)
    rb = 1.0 / tl.sqrt(var[1] + EPS)
    rc = 1.0 / tl.sqrt(var[2] + EPS)
    rd = 1.0 / tl.sqrt(var[3] + EPS)
    return (a * ra, b * rb, c * rc, d * rd), (ra, rb, rc, rd)


@triton.jit
def _standardize_backward(
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
    along = _means(_times(dy, normed), UNITS, GATES, GROUPS, COUNTS)
    a = dy[0] - normed[0] * along[0]
    b = dy[1] - normed[1] * along[1]
    c = dy[2] - normed[2] * along[2]
    d = dy[3] - normed[3] * along[3]
    if CENTER:
        mean = _means(dy, UNITS, GATES, GROUPS, COUNTS)
        a = tl.where(mask, a - mean[0], 0)
        b = tl.where(mask, b - mean[1], 0)
        c = tl.where(mask, c - mean[2], 0)
        d = tl.where(mask, d - mean[3], 0)
    return a * rstd[0], b * rstd[1], c * rstd[2], d * rstd[3]


@triton.jit
def _terms(
    p_ptr,
    q_ptr,
    p_offset,
    q_offset,
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
    """The input term, the hidden term, and for each of both what its norm made of it and its 1 / sqrt(var + eps). With
    a norm over the sum the whole is the input term, the hidden term is 0, and its norm is that of both."""
    p = _load_gates(p_ptr, p_offset, UNITS, cols, mask, GATES, WIDE)
    q = _load_gates(q_ptr, q_offset, UNITS, cols, mask, GATES, WIDE)
    one = tl.sum(p[0], 0) * 0 + 1
    p_rstd = (one, one, one, one)
    q_rstd = p_rstd
    p_normed = p
    q_normed = q
    if gain_sum is not None:
        summed = _with_bias(_plus(p, q), bias_inner, UNITS, cols, mask, GATES, WIDE)
        p_normed, p_rstd = _standardize(summed, UNITS, mask, EPS, GATES, GROUPS, COUNTS, CENTER)
        q_normed = p_normed
        q_rstd = p_rstd
        p = _times(p_normed, _load_gates(gain_sum, 0, UNITS, cols, mask, GATES, WIDE))
        p = _with_bias(p, bias_hh, UNITS, cols, mask, GATES, WIDE)
        nothing = tl.zeros_like(p[0])
        q = (nothing, nothing, nothing, nothing)
    else:
        if gain_ih is not None:
            p_normed, p_rstd = _standardize(p, UNITS, mask, EPS, GATES, GROUPS, COUNTS, CENTER)
            p = _times(p_normed, _load_gates(gain_ih, 0, UNITS, cols, mask, GATES, WIDE))
        if gain_hh is not None:
            q_normed, q_rstd = _standardize(q, UNITS, mask, EPS, GATES, GROUPS, COUNTS, CENTER)
            q = _times(q_normed, _load_gates(gain_hh, 0, UNITS, cols, mask, GATES, WIDE))
        q = _with_bias(q, bias_hh, UNITS, cols, mask, GATES, WIDE)
    p = _with_bias(p, bias_ih, UNITS, cols, mask, GATES, WIDE)
    return p, q, p_normed, p_rstd, q_normed, q_rstd


@triton.jit
def _standardize_cell(c, UNITS: tl.constexpr, mask, EPS: tl.constexpr, CENTER: tl.constexpr):
    """One vector, for which it is more than enough to have one gate."""
    normed, rstd = _standardize((c, c, c, c), UNITS, mask, EPS, 1, 0, 1, CENTER)
    return normed[0], rstd[0]


@triton.jit
def _gru_gates(p, q, UPDATE_OFFSET: tl.constexpr, RESET_AFTER: tl.constexpr):
    """r, z and the candidate n, and what r multiplies."""
    r = _sigmoid(p[0] + q[0])
    z = _sigmoid(p[1] + q[1] + UPDATE_OFFSET)
    if RESET_AFTER:
        gated = q[2]
        n = _tanh(p[2] + r * gated)
    else:
        gated = p[2] + q[2]
        n = _tanh(r * gated)
    return r, z, n, gated


@triton.jit(do_not_specialize=_OF_FORWARD)
def step_forward(
    p_ptr,  # (rows, GATES * units): W_ih x
    q_ptr,  # (state rows, GATES * units): W_hh h
    h_ptr,  # (state rows, units): h before each step, for the matrix product
    wide_ptr,  # the same in WIDE for a GRU, (2 * batch, units), or None
    c_ptr,  # (state rows, units) in WIDE: c before each step, or None
    output,  # (rows, units)
    final_h,  # (batch, units)
    final_c,  # (batch, units), or None
    reset,  # (rows,) bytes, or None
    bias_ih,
    bias_hh,
    gain_ih,
    gain_hh,
    gain_sum,
    bias_inner,
    gain_c,
    bias_c,
    row,  # the first of this step
    next_row,  # the first of the next step
    state_row,  # the same of what is kept of states
    next_state_row,
    wide_row,
    next_wide_row,
    alive_next,  # samples that have the next step
    UNITS: tl.constexpr,
    CELL: tl.constexpr,
    GATES: tl.constexpr,
    GROUPS: tl.constexpr,
    COUNTS: tl.constexpr,
    EPS: tl.constexpr,
    CENTER: tl.constexpr,
    CELL_NORM: tl.constexpr,
    RESET_AFTER: tl.constexpr,
    PAPER_GATE: tl.constexpr,
    UPDATE_OFFSET: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """p, q and the states before one step -> its output and the states before the next one."""
    sample = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < UNITS
    here = row + sample
    state = state_row + sample
    p, q, _, _, _, _ = _terms(
        p_ptr,
        q_ptr,
        here * GATES * UNITS,
        state * GATES * UNITS,
        bias_ih,
        bias_hh,
        gain_ih,
        gain_hh,
        gain_sum,
        bias_inner,
        UNITS,
        cols,
        mask,
        EPS,
        GATES,
        GROUPS,
        COUNTS,
        CENTER,
        WIDE,
    )
    c = tl.zeros_like(p[0])
    if CELL == "lstm":
        c = tl.load(c_ptr + state * UNITS + cols, mask, other=0).to(WIDE)
        c = _sigmoid(p[1] + q[1]) * c + _sigmoid(p[0] + q[0]) * _tanh(p[2] + q[2])
        shown = c
        if gain_c is not None:
            shown, _ = _standardize_cell(tl.where(mask, c, 0), UNITS, mask, EPS, CENTER)
            shown *= tl.load(gain_c + cols, mask, other=0).to(WIDE)
            if bias_c is not None:
                shown += tl.load(bias_c + cols, mask, other=0).to(WIDE)
            if CELL_NORM == "state":
                c = shown
        h = _sigmoid(p[3] + q[3]) * _tanh(shown)
    elif CELL == "gru":
        _, z, n, _ = _gru_gates(p, q, UPDATE_OFFSET, RESET_AFTER)
        if PAPER_GATE:
            z = 1.0 - z
        before = tl.load(wide_ptr + (wide_row + sample) * UNITS + cols, mask, other=0).to(WIDE)
        h = z * before + (1.0 - z) * n
    elif CELL == "rnn_tanh":
        h = _tanh(p[0] + q[0])
    else:
        h = p[0] + q[0]
        h = tl.where(h > 0, h, h * 0)  # NaN stays
    tl.store(output + here * UNITS + cols, h.to(output.dtype.element_ty), mask)
    if sample >= alive_next:
        tl.store(final_h + sample * UNITS + cols, h.to(final_h.dtype.element_ty), mask)
        if CELL == "lstm":
            tl.store(final_c + sample * UNITS + cols, c.to(final_c.dtype.element_ty), mask)
    else:
        if reset is not None:
            starts = tl.load(reset + next_row + sample) != 0
            h = tl.where(starts, 0, h)
            c = tl.where(starts, 0, c)
        next_state = (next_state_row + sample) * UNITS
        tl.store(h_ptr + next_state + cols, h.to(h_ptr.dtype.element_ty), mask)
        if CELL == "lstm":
            tl.store(c_ptr + next_state + cols, c, mask)
        if CELL == "gru":
            tl.store(wide_ptr + (next_wide_row + sample) * UNITS + cols, h, mask)


@triton.jit(do_not_specialize=_OF_BACKWARD)
def step_backward(
    p_ptr,
    q_ptr,
    h_ptr,  # (rows, units): h before each step
    c_ptr,
    doutput,  # (rows, units), or None
    final_dh,  # (batch, units) in WIDE
    dh_by_product,  # (batch, units): dq of the step after times W_hh
    dh_direct,  # (batch, units) in WIDE: what a GRU's blend passed on from the step after, or None
    dc_ptr,  # (batch, units) in WIDE: of c after this step, and then of c before it
    reset,
    bias_ih,
    bias_hh,
    gain_ih,
    gain_hh,
    gain_sum,
    bias_inner,
    gain_c,
    bias_c,
    dp_ptr,  # (rows, GATES * units), or None where it is dq
    dq_ptr,  # (rows, GATES * units)
    sums,  # (batch, 3 * GATES + 3, units) in WIDE: see `rnn.SUMS`
    row,
    next_row,  # the first of the step after this one
    alive_next,
    UNITS: tl.constexpr,
    CELL: tl.constexpr,
    GATES: tl.constexpr,
    GROUPS: tl.constexpr,
    COUNTS: tl.constexpr,
    EPS: tl.constexpr,
    CENTER: tl.constexpr,
    CELL_NORM: tl.constexpr,
    RESET_AFTER: tl.constexpr,
    PAPER_GATE: tl.constexpr,
    UPDATE_OFFSET: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradients of one step's p and q from those of its output and of the states after it; each sample's sums of
    the gradients of gains and biases grow."""
    sample = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < UNITS
    here = row + sample
    of_units = here * UNITS
    of_gates = here * GATES * UNITS
    of_state = sample * UNITS
    p, q, p_normed, p_rstd, q_normed, q_rstd = _terms(
        p_ptr,
        q_ptr,
        of_gates,
        of_gates,
        bias_ih,
        bias_hh,
        gain_ih,
        gain_hh,
        gain_sum,
        bias_inner,
        UNITS,
        cols,
        mask,
        EPS,
        GATES,
        GROUPS,
        COUNTS,
        CENTER,
        WIDE,
    )
    goes_on = sample < alive_next
    passed_on = tl.where(goes_on, UNITS, 0)  # units that get a gradient from the step after
    if reset is not None:
        next_starts = tl.load(reset + next_row + sample, goes_on, other=0) != 0
        passed_on = tl.where(next_starts, 0, passed_on)
    dh = tl.load(dh_by_product + of_state + cols, cols < passed_on, other=0).to(WIDE)
    if CELL == "gru":
        dh += tl.load(dh_direct + of_state + cols, cols < passed_on, other=0)
    dh += tl.load(final_dh + of_state + cols, cols < tl.where(goes_on, 0, UNITS), other=0)
    if doutput is not None:
        dh += tl.load(doutput + of_units + cols, mask, other=0).to(WIDE)

    sums_row = sums + sample * (3 * GATES + 3) * UNITS
    nothing = tl.zeros_like(dh)
    if CELL == "lstm":
        i = _sigmoid(p[0] + q[0])
        f = _sigmoid(p[1] + q[1])
        g = _tanh(p[2] + q[2])
        o = _sigmoid(p[3] + q[3])
        before = tl.load(c_ptr + of_units + cols, mask, other=0)
        c = f * before + i * g
        dc = tl.load(dc_ptr + of_state + cols, cols < tl.where(goes_on, passed_on, UNITS), other=0)
        shown = c
        if gain_c is not None:
            normed, rstd = _standardize_cell(tl.where(mask, c, 0), UNITS, mask, EPS, CENTER)
            gain = tl.load(gain_c + cols, mask, other=0).to(WIDE)
            shown = normed * gain
            if bias_c is not None:
                shown += tl.load(bias_c + cols, mask, other=0).to(WIDE)
        shown = _tanh(shown)
        dshown = dh * o * (1.0 - shown * shown)
        if gain_c is not None:
            if CELL_NORM == "state":
                dshown += dc
                dc = nothing
            at = sums_row + (3 * GATES + 1) * UNITS + cols
            tl.store(at, tl.load(at, mask, other=0) + dshown * normed, mask)
            if bias_c is not None:
                at += UNITS
                tl.store(at, tl.load(at, mask, other=0) + dshown, mask)
            d = dshown * gain
            d, _, _, _ = _standardize_backward(
                (d, d, d, d), (normed, normed, normed, normed), (rstd, rstd, rstd, rstd), UNITS, mask, 1, 0, 1, CENTER
            )
            dc += d
        else:
            dc += dshown
        tl.store(dc_ptr + of_state + cols, dc * f, mask)
        dp = (dc * g * i * (1.0 - i), dc * before * f * (1.0 - f), dc * i * (1.0 - g * g), dh * shown * o * (1.0 - o))
        dq = dp
    elif CELL == "gru":
        r, z, n, gated = _gru_gates(p, q, UPDATE_OFFSET, RESET_AFTER)
        before = tl.load(h_ptr + of_units + cols, mask, other=0).to(WIDE)
        dz = dh * (before - n) * z * (1.0 - z)
        keep = z
        if PAPER_GATE:
            dz = -dz
            keep = 1.0 - z
        tl.store(dh_direct + of_state + cols, dh * keep, mask)
        dn = dh * (1.0 - keep) * (1.0 - n * n)
        dr = dn * gated * r * (1.0 - r)
        if RESET_AFTER:
            dp = (dr, dz, dn, nothing)
            dq = (dr, dz, dn * r, nothing)
        else:
            dp = (dr, dz, dn * r, nothing)
            dq = dp
    elif CELL == "rnn_tanh":
        h = _tanh(p[0] + q[0])
        dp = (dh * (1.0 - h * h), nothing, nothing, nothing)
        dq = dp
    else:
        dp = (tl.where(p[0] + q[0] > 0, dh, 0), nothing, nothing, nothing)
        dq = dp

    if bias_ih is not None or bias_hh is not None:
        _add_gates(sums_row, 0, UNITS, cols, mask, dp, GATES, WIDE)
        if CELL == "gru" and RESET_AFTER:
            at = sums_row + 3 * GATES * UNITS + cols
            tl.store(at, tl.load(at, mask, other=0) + dq[2], mask)
    if gain_sum is not None:
        _add_gates(sums_row, GATES * UNITS, UNITS, cols, mask, _times(dp, p_normed), GATES, WIDE)
        dp = _times(dp, _load_gates(gain_sum, 0, UNITS, cols, mask, GATES, WIDE))
        dp = _standardize_backward(dp, p_normed, p_rstd, UNITS, mask, GATES, GROUPS, COUNTS, CENTER)
        dq = dp
        if bias_inner is not None:
            _add_gates(sums_row, 2 * GATES * UNITS, UNITS, cols, mask, dp, GATES, WIDE)
    else:
        if gain_hh is not None:
            _add_gates(sums_row, GATES * UNITS, UNITS, cols, mask, _times(dq, q_normed), GATES, WIDE)
            dq = _times(dq, _load_gates(gain_hh, 0, UNITS, cols, mask, GATES, WIDE))
            dq = _standardize_backward(dq, q_normed, q_rstd, UNITS, mask, GATES, GROUPS, COUNTS, CENTER)
        if gain_ih is not None:
            _add_gates(sums_row, 2 * GATES * UNITS, UNITS, cols, mask, _times(dp, p_normed), GATES, WIDE)
            dp = _times(dp, _load_gates(gain_ih, 0, UNITS, cols, mask, GATES, WIDE))
            dp = _standardize_backward(dp, p_normed, p_rstd, UNITS, mask, GATES, GROUPS, COUNTS, CENTER)
    _store_gates(dq_ptr, of_gates, UNITS, cols, mask, dq, GATES)
    if dp_ptr is not None:
        _store_gates(dp_ptr, of_gates, UNITS, cols, mask, dp, GATES)
