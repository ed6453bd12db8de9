"""The backward of `grid`, from the last step to the first: a program keeps on chip the columns of W_hh of its units.

What was normalized is known before: its statistics are those of `row_statistics`. A step has two meetings: after what
each program can say of the sums in the norms' backward; and after its share of the gradient of q = W_hh h, the whole of
which each program multiplies by its columns of W_hh, for its share of the gradient of h. Without a norm there is the
second meeting alone.

The sums of the hidden term's norm are of the gates' gradients, which need both sums of the cell's norm. All are
exchanged at once: the gates' gradients are linear in that of c, which is a known vector less two others, each times one
of the sums of the cell's norm; so what is exchanged are the sums of the hidden term's norm for each of the three.

What is exchanged before the first meeting is read before the second one, and written again only after that. The
gradients of q lie elsewhere in each step.
"""

from __future__ import annotations

import triton
import triton.language as tl

from normwise.backends.triton.kernels.cells import (
    cell_backward,
    lstm_gate_gradients,
    lstm_gates,
    lstm_of_output,
    projected_cell,
    projections_of_cell,
)
from normwise.backends.triton.kernels.exchange import (
    ALONG_CELL,
    MEAN_OF_CELL,
    NUMBERS,
    OF_CELL,
    load_shares,
    meet,
    merged_projections,
    publish_projections,
    total,
)
from normwise.backends.triton.kernels.gates import less, load_gates, store_gates
from normwise.backends.triton.kernels.persistent import gradient_of_h, rows_of_step
from normwise.backends.triton.kernels.row_statistics import load_statistics
from normwise.backends.triton.kernels.terms import normalized_terms, projected, terms_of, times_gain

_SIZES = ("steps", "batch", "first_row", "row_step")


@triton.jit(do_not_specialize=_SIZES)
def grid_backward(
    p_ptr,
    q_ptr,
    h_ptr,
    c_ptr,
    doutput,
    dh_ptr,
    dc_ptr,
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
    d_ptr,
    dq_ptr,
    dshown_ptr,
    statistics,  # see `row_statistics`, or None
    counters,  # (tiles, 32) int32, zeros
    partials,  # (batch, exchange.NUMBERS, programs) in WIDE
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
    SHARE: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK_PROGRAMS: tl.constexpr,
):
    tile = tl.program_id(0)
    program = tl.program_id(1)
    counter = counters + tile * 32
    sample = tile.to(tl.int64) * SAMPLES + tl.arange(0, SAMPLES)[:, None]
    cols = program * SHARE + tl.arange(0, SHARE)[None, :]
    mask = cols < UNITS
    inside = (sample < batch) & mask
    unit = tl.arange(0, BLOCK)[None, :]
    second = BLOCK + unit
    every = tl.arange(0, BLOCK_PROGRAMS)[None, :]
    own = partials + sample * (NUMBERS * PROGRAMS) + program
    of_all = partials + sample * (NUMBERS * PROGRAMS) + every

    matrices = load_shares(weight_hh, cols, 0, UNITS, GATES, BLOCK, True, OPERAND)
    if UNITS > BLOCK:
        second_matrices = load_shares(weight_hh, cols, BLOCK, UNITS, GATES, BLOCK, True, OPERAND)
    dh = tl.load(dh_ptr + sample * UNITS + cols, inside, other=0)
    dc = dh
    if CELL == "lstm":
        dc = tl.load(dc_ptr + sample * UNITS + cols, inside, other=0)
    if table is not None:
        steps = tl.load(table + steps + 1 + tile).to(tl.int32)
    arrivals = 0
    for back in range(steps):
        row, samples = rows_of_step(table, steps - 1 - back, first_row, row_step, batch)
        alive = sample < samples
        here = row + sample
        now = alive & mask
        there = alive & (every < PROGRAMS)
        p, q = normalized_terms(
            load_gates(p_ptr, here * GATES * UNITS, UNITS, cols, now, GATES, WIDE),
            load_gates(q_ptr, here * GATES * UNITS, UNITS, cols, now, GATES, WIDE),
            gain_sum,
            bias_inner,
            UNITS,
            cols,
            mask,
            GATES,
            WIDE,
        )
        p_mean, p_rstd, q_mean, q_rstd, cell_mean, cell_rstd = load_statistics(statistics, here, alive)
        p, q, _, q_normed = terms_of(
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
        before = dh
        if CELL == "lstm":
            before = tl.load(c_ptr + here * UNITS + cols, now, other=0)
        elif CELL == "gru":
            before = tl.load(h_ptr + here * UNITS + cols, now, other=0).to(WIDE)
        of_h = dh
        if doutput is not None:
            of_h += tl.load(doutput + here * UNITS + cols, now, other=0).to(WIDE)

        if gain_c is not None:
            gates = lstm_gates(p, q)
            do, dshown, dnormed, next_dc, c_normed = lstm_of_output(
                gates,
                before,
                of_h,
                dc,
                cell_mean,
                cell_rstd,
                gain_c,
                bias_c,
                cols,
                mask,
                CENTER,
                CELL_NORM,
                WIDE,
            )
            along, mean = projections_of_cell(dnormed, c_normed, UNITS, CENTER)
            tl.store(own + OF_CELL * PROGRAMS, along, alive)
            tl.store(own + (OF_CELL + 1) * PROGRAMS, mean, alive)
            # As if both sums were 0.
            d_hidden = lstm_gate_gradients(gates, before, next_dc + dnormed * cell_rstd, do)
        else:
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
        if gain_sum is not None or gain_hh is not None:
            dq = times_gain(d_hidden, gain_hh, gain_sum, UNITS, cols, mask, GATES, WIDE)
            publish_projections(own, dq, q_normed, alive, UNITS, GATES, GROUPS, COUNTS, CENTER, PROGRAMS)
            if gain_c is not None:
                nothing = tl.zeros_like(dh)
                dq = lstm_gate_gradients(gates, before, c_normed * cell_rstd, nothing)
                dq = times_gain(dq, gain_hh, gain_sum, UNITS, cols, mask, GATES, WIDE)
                at = own + ALONG_CELL * PROGRAMS
                publish_projections(at, dq, q_normed, alive, UNITS, GATES, GROUPS, COUNTS, CENTER, PROGRAMS)
                if CENTER:
                    dq = lstm_gate_gradients(gates, before, nothing + cell_rstd, nothing)
                    dq = times_gain(dq, gain_hh, gain_sum, UNITS, cols, mask, GATES, WIDE)
                    at = own + MEAN_OF_CELL * PROGRAMS
                    publish_projections(at, dq, q_normed, alive, UNITS, GATES, GROUPS, COUNTS, CENTER, PROGRAMS)
        if gain_sum is not None or gain_hh is not None or gain_c is not None:
            arrivals += PROGRAMS
            meet(counter, arrivals)
        if gain_c is not None:
            along = total(of_all + OF_CELL * PROGRAMS, there)
            mean = along
            if CENTER:
                mean = total(of_all + (OF_CELL + 1) * PROGRAMS, there)
            next_dc += projected_cell(dnormed, c_normed, cell_rstd, along, mean, mask, CENTER)
            dbefore = next_dc * gates[1]
            d = lstm_gate_gradients(gates, before, next_dc, do)
            d_hidden = d
        dq = d_hidden
        if gain_sum is not None or gain_hh is not None:
            q_along, q_mean = merged_projections(of_all, there, GATES, GROUPS, CENTER, PROGRAMS)
            if gain_c is not None:
                at = of_all + ALONG_CELL * PROGRAMS
                less_along, less_mean = merged_projections(at, there, GATES, GROUPS, CENTER, PROGRAMS)
                q_along = less(q_along, less_along, along)
                q_mean = less(q_mean, less_mean, along)
                if CENTER:
                    at = of_all + MEAN_OF_CELL * PROGRAMS
                    less_along, less_mean = merged_projections(at, there, GATES, GROUPS, CENTER, PROGRAMS)
                    q_along = less(q_along, less_along, mean)
                    q_mean = less(q_mean, less_mean, mean)
            dq = times_gain(d_hidden, gain_hh, gain_sum, UNITS, cols, mask, GATES, WIDE)
            dq = projected(dq, q_normed, q_rstd, q_along, q_mean, mask, CENTER)
        store_gates(dq_ptr, here * GATES * UNITS, UNITS, cols, now, dq, GATES)
        arrivals += PROGRAMS
        meet(counter, arrivals)
        if d_ptr is not None:
            store_gates(d_ptr, here * GATES * UNITS, UNITS, cols, now, d, GATES)
        if dshown_ptr is not None:
            tl.store(dshown_ptr + here * UNITS + cols, dshown, now)
        at = here * GATES * UNITS
        whole = load_gates(dq_ptr, at, UNITS, unit, alive & (unit < UNITS), GATES, OPERAND, ".cg")
        next_dh = gradient_of_h(whole, matrices, dq_ptr, GATES, WIDE, OPERAND, PRECISION)
        if UNITS > BLOCK:
            whole = load_gates(dq_ptr, at, UNITS, second, alive & (second < UNITS), GATES, OPERAND, ".cg")
            next_dh += gradient_of_h(whole, second_matrices, dq_ptr, GATES, WIDE, OPERAND, PRECISION)
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
