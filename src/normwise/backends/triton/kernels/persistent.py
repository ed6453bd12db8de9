"""All steps of a recurrence in one launch: a program takes some samples, keeps W_hh on chip, and their states in
registers.

As in `recurrent`, rows of a step are `p` = W_ih x, `q` = W_hh h and the states before the step, zeroed where it is
reset. `table` is None where all samples have all steps: step t begins at row first_row + t * row_step. Else it holds
where each step's rows begin, where the last one's end, and how many steps each program has.

The loop of the backward computes only what the step before waits for. The gradients of p, gains and biases are of each
row by itself, and come from another kernel once all steps are done.
"""

from __future__ import annotations

import triton
import triton.language as tl

from normwise.backends.triton.kernels.cells import (
    cell_backward,
    cell_forward,
    gru_gates,
    lstm_cell,
    lstm_gates,
    normed_cell,
    statistics_of_cell,
)
from normwise.backends.triton.kernels.gates import load_gates, store_gates
from normwise.backends.triton.kernels.sums import add_inner_sums, add_sums
from normwise.backends.triton.kernels.terms import hidden_backward, input_backward, terms

# Of which no value is worth a compilation.
_SIZES = ("steps", "batch", "first_row", "row_step")


@triton.jit
def load_matrix(ptr, UNITS: tl.constexpr, BLOCK: tl.constexpr, TRANSPOSED: tl.constexpr, OPERAND: tl.constexpr):
    """One gate's rows of W_hh, (units of the gate, units of h), or turned round."""
    gate = tl.arange(0, BLOCK)[:, None]
    unit = tl.arange(0, BLOCK)[None, :]
    if TRANSPOSED:
        gate = tl.arange(0, BLOCK)[None, :]
        unit = tl.arange(0, BLOCK)[:, None]
    return tl.load(ptr + gate * UNITS + unit, (gate < UNITS) & (unit < UNITS), other=0).to(OPERAND)


@triton.jit
def load_matrices(
    ptr,
    UNITS: tl.constexpr,
    BLOCK: tl.constexpr,
    GATES: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    OPERAND: tl.constexpr,
):
    a = load_matrix(ptr, UNITS, BLOCK, TRANSPOSED, OPERAND)
    b = a
    c = a
    d = a
    if GATES > 1:
        b = load_matrix(ptr + UNITS * UNITS, UNITS, BLOCK, TRANSPOSED, OPERAND)
        c = load_matrix(ptr + 2 * UNITS * UNITS, UNITS, BLOCK, TRANSPOSED, OPERAND)
    if GATES > 3:
        d = load_matrix(ptr + 3 * UNITS * UNITS, UNITS, BLOCK, TRANSPOSED, OPERAND)
    return a, b, c, d


@triton.jit
def hidden_products(h, matrices, GATES: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr):
    """q of one step, by gates."""
    a = tl.dot(h, matrices[0], input_precision=PRECISION).to(WIDE)
    b = tl.zeros_like(a)
    c = tl.zeros_like(a)
    d = tl.zeros_like(a)
    if GATES > 1:
        b = tl.dot(h, matrices[1], input_precision=PRECISION).to(WIDE)
        c = tl.dot(h, matrices[2], input_precision=PRECISION).to(WIDE)
    if GATES > 3:
        d = tl.dot(h, matrices[3], input_precision=PRECISION).to(WIDE)
    return a, b, c, d


@triton.jit
def rounded(v, ptr, OPERAND: tl.constexpr):
    """To the dtype of `ptr`, as an operand of a product."""
    return v.to(ptr.dtype.element_ty).to(OPERAND)


@triton.jit
def gradient_of_h(
    dq, matrices, ptr, GATES: tl.constexpr, WIDE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr
):
    dh = tl.dot(rounded(dq[0], ptr, OPERAND), matrices[0], input_precision=PRECISION).to(WIDE)
    if GATES > 1:
        dh += tl.dot(rounded(dq[1], ptr, OPERAND), matrices[1], input_precision=PRECISION).to(WIDE)
        dh += tl.dot(rounded(dq[2], ptr, OPERAND), matrices[2], input_precision=PRECISION).to(WIDE)
    if GATES > 3:
        dh += tl.dot(rounded(dq[3], ptr, OPERAND), matrices[3], input_precision=PRECISION).to(WIDE)
    return dh


@triton.jit
def rows_of_step(table, t, first_row, row_step, batch):
    """The first row of a step, and how many it has."""
    row = first_row.to(tl.int64) + t * row_step.to(tl.int64)
    samples = batch
    if table is not None:
        row = tl.load(table + t)
        samples = tl.load(table + t + 1) - row
    return row, samples


@triton.jit(do_not_specialize=_SIZES)
def sequence_forward(
    p_ptr,  # (rows, GATES * units): W_ih x
    q_ptr,  # (rows, GATES * units): becomes W_hh h, or None; and so h_ptr and c_ptr, before each step
    h_ptr,  # (rows, units)
    c_ptr,  # (rows, units) in WIDE, or None
    output,  # (rows, units)
    h0,  # (batch, units)
    c0,  # (batch, units), or None
    final_h,  # (batch, units)
    final_c,  # (batch, units), or None
    reset,  # (rows,) bytes, or None
    table,  # int64, or None
    weight_hh,  # (GATES * units, units)
    bias_ih,
    bias_hh,
    gain_ih,
    gain_hh,
    gain_sum,
    bias_inner,
    gain_c,
    bias_c,
    steps,
    batch,
    first_row,
    row_step,
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
    OPERAND: tl.constexpr,  # the dtype of products' operands
    PRECISION: tl.constexpr,  # of products of float32
    SAMPLES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    sample = program.to(tl.int64) * SAMPLES + tl.arange(0, SAMPLES)[:, None]
    cols = tl.arange(0, BLOCK)[None, :]
    mask = cols < UNITS
    inside = (sample < batch) & mask
    matrices = load_matrices(weight_hh, UNITS, BLOCK, GATES, True, OPERAND)
    h = tl.load(h0 + sample * UNITS + cols, inside, other=0).to(WIDE)
    c = h
    if CELL == "lstm":
        c = tl.load(c0 + sample * UNITS + cols, inside, other=0).to(WIDE)
    if table is not None:
        steps = tl.load(table + steps + 1 + program).to(tl.int32)
    for t in range(steps):
        row, samples = rows_of_step(table, t, first_row, row_step, batch)
        alive = sample < samples
        here = row + sample
        now = alive & mask
        p = load_gates(p_ptr, here * GATES * UNITS, UNITS, cols, now, GATES, WIDE)
        if reset is not None:
            starts = tl.load(reset + here, alive, other=0) != 0
            h = tl.where(starts, 0, h)
            c = tl.where(starts, 0, c)
        q = hidden_products(rounded(h, output, OPERAND), matrices, GATES, WIDE, PRECISION)
        if q_ptr is not None:
            store_gates(q_ptr, here * GATES * UNITS, UNITS, cols, now, q, GATES)
            tl.store(h_ptr + here * UNITS + cols, h.to(h_ptr.dtype.element_ty), now)
            if CELL == "lstm":
                tl.store(c_ptr + here * UNITS + cols, c, now)
        p, q, _, _, _, _ = terms(
            p,
            q,
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
        before = h
        if CELL == "lstm":
            before = c
        next_h, next_c = cell_forward(
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
        tl.store(output + here * UNITS + cols, next_h.to(output.dtype.element_ty), now)
        h = tl.where(now, next_h, h)
        if CELL == "lstm":
            c = tl.where(now, next_c, c)
    tl.store(final_h + sample * UNITS + cols, h.to(final_h.dtype.element_ty), inside)
    if CELL == "lstm":
        tl.store(final_c + sample * UNITS + cols, c.to(final_c.dtype.element_ty), inside)


@triton.jit(do_not_specialize=_SIZES)
def sequence_backward(
    p_ptr,
    q_ptr,
    h_ptr,
    c_ptr,
    doutput,  # (rows, units), or None
    dh_ptr,  # (batch, units) in WIDE: of the final h, and then of h0
    dc_ptr,  # the same of c, or None
    reset,
    table,
    weight_hh,
    bias_ih,
    bias_hh,
    gain_ih,
    gain_hh,
    gain_sum,
    bias_inner,
    gain_c,
    bias_c,
    d_ptr,  # (rows, GATES * units) in WIDE: becomes the gradient of the input term, or of the sum; or None
    dq_ptr,  # (rows, GATES * units)
    dshown_ptr,  # (rows, units) in WIDE: of the cell norm's result after gain and bias, or None
    steps,
    batch,
    first_row,
    row_step,
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
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    SAMPLES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    sample = program.to(tl.int64) * SAMPLES + tl.arange(0, SAMPLES)[:, None]
    cols = tl.arange(0, BLOCK)[None, :]
    mask = cols < UNITS
    inside = (sample < batch) & mask
    matrices = load_matrices(weight_hh, UNITS, BLOCK, GATES, False, OPERAND)
    dh = tl.load(dh_ptr + sample * UNITS + cols, inside, other=0)
    dc = dh
    if CELL == "lstm":
        dc = tl.load(dc_ptr + sample * UNITS + cols, inside, other=0)
    if table is not None:
        steps = tl.load(table + steps + 1 + program).to(tl.int32)
    for back in range(steps):
        row, samples = rows_of_step(table, steps - 1 - back, first_row, row_step, batch)
        alive = sample < samples
        here = row + sample
        now = alive & mask
        p, q, _, _, q_normed, q_rstd = terms(
            load_gates(p_ptr, here * GATES * UNITS, UNITS, cols, now, GATES, WIDE),
            load_gates(q_ptr, here * GATES * UNITS, UNITS, cols, now, GATES, WIDE),
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
        before = dh
        if CELL == "lstm":
            before = tl.load(c_ptr + here * UNITS + cols, now, other=0)
        elif CELL == "gru":
            before = tl.load(h_ptr + here * UNITS + cols, now, other=0).to(WIDE)
        of_h = dh
        if doutput is not None:
            of_h += tl.load(doutput + here * UNITS + cols, now, other=0).to(WIDE)
        d, d_hidden, dbefore, dshown, _ = cell_backward(
            p,
            q,
            before,
            of_h,
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
        if d_ptr is not None:
            store_gates(d_ptr, here * GATES * UNITS, UNITS, cols, now, d, GATES)
        if dshown_ptr is not None:
            tl.store(dshown_ptr + here * UNITS + cols, dshown, now)
        dq = hidden_backward(
            d_hidden, q_normed, q_rstd, gain_hh, gain_sum, UNITS, cols, mask, GATES, GROUPS, COUNTS, CENTER, WIDE
        )
        store_gates(dq_ptr, here * GATES * UNITS, UNITS, cols, now, dq, GATES)
        next_dh = gradient_of_h(dq, matrices, dq_ptr, GATES, WIDE, OPERAND, PRECISION)
        if CELL == "gru":
            next_dh += dbefore
        if reset is not None:
            starts = tl.load(reset + here, alive, other=0) != 0
            next_dh = tl.where(starts, 0, next_dh)
            dbefore = tl.where(starts, 0, dbefore)
        dh = tl.where(now, next_dh, dh)
        if CELL == "lstm":
            dc = tl.where(now, dbefore, dc)
    tl.store(dh_ptr + sample * UNITS + cols, dh, inside)
    if CELL == "lstm":
        tl.store(dc_ptr + sample * UNITS + cols, dc, inside)


@triton.jit(do_not_specialize=("rows",))
def rows_of_sequence_backward(
    p_ptr,
    q_ptr,
    c_ptr,
    bias_ih,
    bias_hh,
    gain_ih,
    gain_hh,
    gain_sum,
    bias_inner,
    gain_c,
    bias_c,
    d_ptr,
    dq_ptr,
    dshown_ptr,
    dp_ptr,  # (rows, GATES * units): becomes the gradient of p, or None where it is dq
    sums,  # (programs, 3 * GATES + 3, units) in WIDE: see `rnn.requests.SUMS`
    rows,
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
    """What `sequence_backward` left out, of every `programs`-th row."""
    program = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < UNITS
    of_sums = sums + program * (3 * GATES + 3) * UNITS
    for row in range(program, rows, tl.num_programs(0)):
        of_gates = row * GATES * UNITS
        of_units = row * UNITS
        p, q, p_normed, p_rstd, q_normed, _ = terms(
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
        d = load_gates(d_ptr, of_gates, UNITS, cols, mask, GATES, WIDE)
        dq = load_gates(dq_ptr, of_gates, UNITS, cols, mask, GATES, WIDE)
        d_hidden = d
        if CELL == "gru" and RESET_AFTER:
            r, _, _, _ = gru_gates(p, q, UPDATE_OFFSET, RESET_AFTER)
            d_hidden = (d[0], d[1], d[2] * r, d[3])
        dshown = d[0]
        cell_normed = d[0]
        if gain_c is not None:
            dshown = tl.load(dshown_ptr + of_units + cols, mask, other=0)
            before = tl.load(c_ptr + of_units + cols, mask, other=0)
            c = lstm_cell(lstm_gates(p, q), before)
            mean, rstd = statistics_of_cell(c, UNITS, mask, EPS, CENTER)
            cell_normed = normed_cell(c, mean, rstd, mask, CENTER)
        if dp_ptr is not None:
            dp = input_backward(
                d, dq, p_normed, p_rstd, gain_ih, gain_sum, UNITS, cols, mask, GATES, GROUPS, COUNTS, CENTER, WIDE
            )
            store_gates(dp_ptr, of_gates, UNITS, cols, mask, dp, GATES)
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
        add_inner_sums(of_sums, dq, bias_inner, UNITS, cols, mask, GATES, WIDE)
        tl.debug_barrier()  # a thread may load a sum that another one stored
