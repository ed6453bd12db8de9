"""All steps of a recurrence in one launch whose programs wait for one another: for each tile of samples a row of
programs, each of which keeps on chip the rows of W_hh of some units, all their gates.

A step has two meetings: after what each program can say of the norm of its share of W_hh h, mean and sum of squared
deviations, which all of them merge by the formula of Chan, Golub and LeVeque; and after its share of h (or, where the
cell has a norm, of o and c and what can be said of c), from which each program makes the whole of h for itself. What is
exchanged in a step lies elsewhere than in the step before it: a program may be a meeting ahead of another one that
still reads.

Rows, states and `table` are as in `persistent`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from normwise.backends.triton.kernels.cells import cell_forward, lstm_cell, lstm_gates, normed_cell, shown_cell
from normwise.backends.triton.kernels.exchange import load_shares, meet, merged, publish
from normwise.backends.triton.kernels.gates import load_gates, plus, store_gates, tanh
from normwise.backends.triton.kernels.persistent import hidden_products, rounded, rows_of_step
from normwise.backends.triton.kernels.row_statistics import load_statistics
from normwise.backends.triton.kernels.terms import normalized_terms, terms_of

_SIZES = ("steps", "batch", "first_row", "row_step")


@triton.jit
def load_whole(
    shares,
    of_o,
    of_c,
    mean,
    rstd,
    gain_c,
    bias_c,
    output,
    unit,
    alive,
    UNITS: tl.constexpr,
    CENTER: tl.constexpr,
    WIDE: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """h of all programs, of some units: as they shared it, or from their o and c where the cell has a norm."""
    every = unit < UNITS
    h = tl.load(shares + of_o * UNITS + unit, alive & every, other=0, cache_modifier=".cg")
    if gain_c is not None:
        c = tl.load(shares + of_c * UNITS + unit, alive & every, other=0, cache_modifier=".cg")
        shown = shown_cell(normed_cell(c, mean, rstd, every, CENTER), gain_c, bias_c, unit, every, WIDE)
        h = rounded(h * tanh(shown), output, OPERAND)
    return h.to(OPERAND)


@triton.jit(do_not_specialize=_SIZES)
def grid_forward(
    p_ptr,
    q_ptr,
    h_ptr,
    c_ptr,
    output,
    h0,
    c0,
    final_h,
    final_c,
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
    statistics,  # see `row_statistics`: of the input term's norm, or None
    counters,  # (tiles, 32) int32, zeros
    partials,  # (2, 2, batch, 8, programs) in WIDE: of the hidden term or the sum, and of c
    shares,  # (2, 2, batch, units): of h, as `output`; or of o and c in WIDE
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
    BLOCK: tl.constexpr,  # of units of h, at least half of them
    SHARE: tl.constexpr,  # units of a program
    PROGRAMS: tl.constexpr,  # of a tile of samples
    BLOCK_PROGRAMS: tl.constexpr,
):
    tile = tl.program_id(0)
    program = tl.program_id(1)
    counter = counters + tile * 32
    sample = tile.to(tl.int64) * SAMPLES + tl.arange(0, SAMPLES)[:, None]
    cols = program * SHARE + tl.arange(0, SHARE)[None, :]
    mask = cols < UNITS
    units_here = tl.minimum(UNITS - program * SHARE, SHARE).to(WIDE)
    # A product keeps all of h that it multiplies in registers: that of many units is made of two.
    unit = tl.arange(0, BLOCK)[None, :]
    second = BLOCK + unit
    exists = sample < batch
    inside = exists & mask

    matrices = load_shares(weight_hh, cols, 0, UNITS, GATES, BLOCK, False, OPERAND)
    whole = tl.load(h0 + sample * UNITS + unit, exists & (unit < UNITS), other=0).to(OPERAND)
    if UNITS > BLOCK:
        second_matrices = load_shares(weight_hh, cols, BLOCK, UNITS, GATES, BLOCK, False, OPERAND)
        second_whole = tl.load(h0 + sample * UNITS + second, exists & (second < UNITS), other=0).to(OPERAND)
    h = tl.load(h0 + sample * UNITS + cols, inside, other=0).to(WIDE)
    c = h
    if CELL == "lstm":
        c = tl.load(c0 + sample * UNITS + cols, inside, other=0).to(WIDE)
    if table is not None:
        steps = tl.load(table + steps + 1 + tile).to(tl.int32)
    arrivals = 0
    for t in range(steps):
        row, samples = rows_of_step(table, t, first_row, row_step, batch)
        alive = sample < samples
        here = row + sample
        now = alive & mask
        of_hidden = (t % 2) * 2 * batch + sample
        of_cell = of_hidden + batch
        p = load_gates(p_ptr, here * GATES * UNITS, UNITS, cols, now, GATES, WIDE)
        if reset is not None:
            starts = tl.load(reset + here, alive, other=0) != 0
            whole = tl.where(starts, 0, whole).to(OPERAND)
            if UNITS > BLOCK:
                second_whole = tl.where(starts, 0, second_whole).to(OPERAND)
            h = tl.where(starts, 0, h)
            c = tl.where(starts, 0, c)
        q = hidden_products(whole, matrices, GATES, WIDE, PRECISION)
        if UNITS > BLOCK:
            q = plus(q, hidden_products(second_whole, second_matrices, GATES, WIDE, PRECISION))
        if q_ptr is not None:
            store_gates(q_ptr, here * GATES * UNITS, UNITS, cols, now, q, GATES)
            tl.store(h_ptr + here * UNITS + cols, h.to(h_ptr.dtype.element_ty), now)
            if CELL == "lstm":
                tl.store(c_ptr + here * UNITS + cols, c, now)
        p, q = normalized_terms(p, q, gain_sum, bias_inner, UNITS, cols, mask, GATES, WIDE)
        p_mean, p_rstd, q_mean, q_rstd, _, _ = load_statistics(statistics, here, alive)
        if gain_sum is not None or gain_hh is not None:
            exchanged = q
            if gain_sum is not None:
                exchanged = p
            publish(partials, of_hidden, exchanged, program, mask, alive, units_here, GATES, PROGRAMS)
            arrivals += PROGRAMS
            meet(counter, arrivals)
            q_mean, q_rstd = merged(
                partials, of_hidden, alive, UNITS, EPS, GATES, GROUPS, COUNTS, CENTER, SHARE, PROGRAMS, BLOCK_PROGRAMS
            )
            if gain_sum is not None:
                p_mean = q_mean
                p_rstd = q_rstd
        p, q, _, _ = terms_of(
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
        if gain_c is not None:
            gates = lstm_gates(p, q)
            next_c = lstm_cell(gates, c)
            cs = (next_c, next_c, next_c, next_c)
            publish(partials, of_cell, cs, program, mask, alive, units_here, 1, PROGRAMS)
            tl.store(shares + of_hidden * UNITS + cols, gates[3], now)
            tl.store(shares + of_cell * UNITS + cols, next_c, now)
            arrivals += PROGRAMS
            meet(counter, arrivals)
            mean, rstd = merged(partials, of_cell, alive, UNITS, EPS, 1, 0, 1, CENTER, SHARE, PROGRAMS, BLOCK_PROGRAMS)
            cell_mean = mean[0]
            cell_rstd = rstd[0]
            shown = shown_cell(
                normed_cell(next_c, cell_mean, cell_rstd, mask, CENTER), gain_c, bias_c, cols, mask, WIDE
            )
            if CELL_NORM == "state":
                next_c = shown
            next_h = gates[3] * tanh(shown)
        else:
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
            tl.store(shares + of_hidden * UNITS + cols, next_h.to(shares.dtype.element_ty), now)
            arrivals += PROGRAMS
            meet(counter, arrivals)
            cell_mean = 0.0
            cell_rstd = 1.0
        next_whole = load_whole(
            shares,
            of_hidden,
            of_cell,
            cell_mean,
            cell_rstd,
            gain_c,
            bias_c,
            output,
            unit,
            alive,
            UNITS,
            CENTER,
            WIDE,
            OPERAND,
        )
        whole = tl.where(alive, next_whole, whole)
        if UNITS > BLOCK:
            next_whole = load_whole(
                shares,
                of_hidden,
                of_cell,
                cell_mean,
                cell_rstd,
                gain_c,
                bias_c,
                output,
                second,
                alive,
                UNITS,
                CENTER,
                WIDE,
                OPERAND,
            )
            second_whole = tl.where(alive, next_whole, second_whole)
        tl.store(output + here * UNITS + cols, next_h.to(output.dtype.element_ty), now)
        h = tl.where(now, next_h, h)
        if CELL == "lstm":
            c = tl.where(now, next_c, c)
    tl.store(final_h + sample * UNITS + cols, h.to(final_h.dtype.element_ty), inside)
    if CELL == "lstm":
        tl.store(final_c + sample * UNITS + cols, c.to(final_c.dtype.element_ty), inside)
