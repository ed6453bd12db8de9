"""The cell of a recurrent layer, one step of all samples a launch, forward and backward.

One program computes one sample's row, so that its statistics need no other program and no sum depends on the order in
which programs run. A row's gates are kept as four vectors of units (those that the cell has not are zeros, and cost
nothing). Everything is computed in `WIDE`: float32, or float64 for float64.

Rows of a step are `p` = W_ih x, `q` = W_hh h and the states before the step, all as in `Recurrence`'s equations. States
before a step are stored by the step before it, zeroed where the step is reset; those of a sequence that ends go to the
final states.
"""

from __future__ import annotations

import triton
import triton.language as tl

from normwise.backends.triton.kernels.gates import (
    add_gates,
    gru_gates,
    load_gates,
    sigmoid,
    standardize_backward,
    standardize_cell,
    store_gates,
    tanh,
    terms,
    times,
)

# What changes from step to step, of which no value is worth a compilation.
_OF_FORWARD = ("row", "next_row", "state_row", "next_state_row", "wide_row", "next_wide_row", "alive_next")
_OF_BACKWARD = ("row", "next_row", "alive_next")


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
    p, q, _, _, _, _ = terms(
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
        c = sigmoid(p[1] + q[1]) * c + sigmoid(p[0] + q[0]) * tanh(p[2] + q[2])
        shown = c
        if gain_c is not None:
            shown, _ = standardize_cell(tl.where(mask, c, 0), UNITS, mask, EPS, CENTER)
            shown *= tl.load(gain_c + cols, mask, other=0).to(WIDE)
            if bias_c is not None:
                shown += tl.load(bias_c + cols, mask, other=0).to(WIDE)
            if CELL_NORM == "state":
                c = shown
        h = sigmoid(p[3] + q[3]) * tanh(shown)
    elif CELL == "gru":
        _, z, n, _ = gru_gates(p, q, UPDATE_OFFSET, RESET_AFTER)
        if PAPER_GATE:
            z = 1.0 - z
        before = tl.load(wide_ptr + (wide_row + sample) * UNITS + cols, mask, other=0).to(WIDE)
        h = z * before + (1.0 - z) * n
    elif CELL == "rnn_tanh":
        h = tanh(p[0] + q[0])
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
    p, q, p_normed, p_rstd, q_normed, q_rstd = terms(
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
        i = sigmoid(p[0] + q[0])
        f = sigmoid(p[1] + q[1])
        g = tanh(p[2] + q[2])
        o = sigmoid(p[3] + q[3])
        before = tl.load(c_ptr + of_units + cols, mask, other=0)
        c = f * before + i * g
        dc = tl.load(dc_ptr + of_state + cols, cols < tl.where(goes_on, passed_on, UNITS), other=0)
        shown = c
        if gain_c is not None:
            normed, rstd = standardize_cell(tl.where(mask, c, 0), UNITS, mask, EPS, CENTER)
            gain = tl.load(gain_c + cols, mask, other=0).to(WIDE)
            shown = normed * gain
            if bias_c is not None:
                shown += tl.load(bias_c + cols, mask, other=0).to(WIDE)
        shown = tanh(shown)
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
            d, _, _, _ = standardize_backward(
                (d, d, d, d), (normed, normed, normed, normed), (rstd, rstd, rstd, rstd), UNITS, mask, 1, 0, 1, CENTER
            )
            dc += d
        else:
            dc += dshown
        tl.store(dc_ptr + of_state + cols, dc * f, mask)
        dp = (dc * g * i * (1.0 - i), dc * before * f * (1.0 - f), dc * i * (1.0 - g * g), dh * shown * o * (1.0 - o))
        dq = dp
    elif CELL == "gru":
        r, z, n, gated = gru_gates(p, q, UPDATE_OFFSET, RESET_AFTER)
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
        h = tanh(p[0] + q[0])
        dp = (dh * (1.0 - h * h), nothing, nothing, nothing)
        dq = dp
    else:
        dp = (tl.where(p[0] + q[0] > 0, dh, 0), nothing, nothing, nothing)
        dq = dp

    if bias_ih is not None or bias_hh is not None:
        add_gates(sums_row, 0, UNITS, cols, mask, dp, GATES, WIDE)
        if CELL == "gru" and RESET_AFTER:
            at = sums_row + 3 * GATES * UNITS + cols
            tl.store(at, tl.load(at, mask, other=0) + dq[2], mask)
    if gain_sum is not None:
        add_gates(sums_row, GATES * UNITS, UNITS, cols, mask, times(dp, p_normed), GATES, WIDE)
        dp = times(dp, load_gates(gain_sum, 0, UNITS, cols, mask, GATES, WIDE))
        dp = standardize_backward(dp, p_normed, p_rstd, UNITS, mask, GATES, GROUPS, COUNTS, CENTER)
        dq = dp
        if bias_inner is not None:
            add_gates(sums_row, 2 * GATES * UNITS, UNITS, cols, mask, dp, GATES, WIDE)
    else:
        if gain_hh is not None:
            add_gates(sums_row, GATES * UNITS, UNITS, cols, mask, times(dq, q_normed), GATES, WIDE)
            dq = times(dq, load_gates(gain_hh, 0, UNITS, cols, mask, GATES, WIDE))
            dq = standardize_backward(dq, q_normed, q_rstd, UNITS, mask, GATES, GROUPS, COUNTS, CENTER)
        if gain_ih is not None:
            add_gates(sums_row, 2 * GATES * UNITS, UNITS, cols, mask, times(dp, p_normed), GATES, WIDE)
            dp = times(dp, load_gates(gain_ih, 0, UNITS, cols, mask, GATES, WIDE))
            dp = standardize_backward(dp, p_normed, p_rstd, UNITS, mask, GATES, GROUPS, COUNTS, CENTER)
    store_gates(dq_ptr, of_gates, UNITS, cols, mask, dq, GATES)
    if dp_ptr is not None:
        store_gates(dp_ptr, of_gates, UNITS, cols, mask, dp, GATES)
