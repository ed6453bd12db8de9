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

from normwise.backends.triton.kernels.cells import cell_backward, cell_forward
from normwise.backends.triton.kernels.gates import load_gates, store_gates
from normwise.backends.triton.kernels.sums import add_inner_sums, add_sums
from normwise.backends.triton.kernels.terms import hidden_backward, input_backward, terms

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
        load_gates(p_ptr, here * GATES * UNITS, UNITS, cols, mask, GATES, WIDE),
        load_gates(q_ptr, state * GATES * UNITS, UNITS, cols, mask, GATES, WIDE),
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
    before = p[0]  # for an RNN, which asks for none
    if CELL == "lstm":
        before = tl.load(c_ptr + state * UNITS + cols, mask, other=0)
    elif CELL == "gru":
        before = tl.load(wide_ptr + (wide_row + sample) * UNITS + cols, mask, other=0)
    h, c = cell_forward(
        p,
        q,
        before,
        gain_c,
        bias_c,
        UNITS,
        cols,
        mask,
        EPS,
        CENTER,
        CELL,
        CELL_NORM,
        RESET_AFTER,
        PAPER_GATE,
        UPDATE_OFFSET,
        WIDE,
    )
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
    sums,  # (batch, 3 * GATES + 3, units) in WIDE: see `rnn.requests.SUMS`
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
        load_gates(p_ptr, of_gates, UNITS, cols, mask, GATES, WIDE),
        load_gates(q_ptr, of_gates, UNITS, cols, mask, GATES, WIDE),
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

    dc = dh
    before = dh
    if CELL == "lstm":
        dc = tl.load(dc_ptr + of_state + cols, cols < tl.where(goes_on, passed_on, UNITS), other=0)
        before = tl.load(c_ptr + of_units + cols, mask, other=0)
    elif CELL == "gru":
        before = tl.load(h_ptr + of_units + cols, mask, other=0).to(WIDE)
    d, d_hidden, dbefore, dshown, cell_normed = cell_backward(
        p,
        q,
        before,
        dh,
        dc,
        gain_c,
        bias_c,
        UNITS,
        cols,
        mask,
        EPS,
        CENTER,
        CELL,
        CELL_NORM,
        RESET_AFTER,
        PAPER_GATE,
        UPDATE_OFFSET,
        WIDE,
    )
    if CELL == "lstm":
        tl.store(dc_ptr + of_state + cols, dbefore, mask)
    elif CELL == "gru":
        tl.store(dh_direct + of_state + cols, dbefore, mask)
    of_sums = sums + sample * (3 * GATES + 3) * UNITS
    add_sums(
        of_sums,
        d,
        d_hidden,
        p_normed,
        q_normed,
        dshown,
        cell_normed,
        bias_ih,
        bias_hh,
        gain_ih,
        gain_hh,
        gain_sum,
        gain_c,
        bias_c,
        UNITS,
        cols,
        mask,
        CELL,
        GATES,
        RESET_AFTER,
        WIDE,
    )
    dq = hidden_backward(
        d_hidden, q_normed, q_rstd, gain_hh, gain_sum, UNITS, cols, mask, GATES, GROUPS, COUNTS, CENTER, WIDE
    )
    store_gates(dq_ptr, of_gates, UNITS, cols, mask, dq, GATES)
    if dp_ptr is not None:
        dp = input_backward(
            d, dq, p_normed, p_rstd, gain_ih, gain_sum, UNITS, cols, mask, GATES, GROUPS, COUNTS, CENTER, WIDE
        )
        store_gates(dp_ptr, of_gates, UNITS, cols, mask, dp, GATES)
    add_inner_sums(of_sums, dq, bias_inner, UNITS, cols, mask, GATES, WIDE)
