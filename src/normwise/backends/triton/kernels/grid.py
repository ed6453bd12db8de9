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

from normwise.backends.triton.kernels.cells import cell_forward
from normwise.backends.triton.kernels.gates import (
    load_gates,
    mean_of_group,
    means,
    plus,
    row_sum,
    sigmoid,
    store_gates,
    tanh,
    times,
    with_bias,
)
from normwise.backends.triton.kernels.persistent import hidden_products, rounded, rows_of_step

_SIZES = ("steps", "batch", "first_row", "row_step")


@triton.jit
def meet(counter, arrivals):
    """Waits until programs have arrived so often in all; what they stored before can be read after, past the first
    cache. All threads have stored before the one that tells of it."""
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="release", scope="gpu")
    while tl.atomic_add(counter, 0, sem="acquire", scope="gpu") < arrivals:
        pass


@triton.jit
def publish_one(at, v, mask, there, units_here, PROGRAMS: tl.constexpr):
    mean = row_sum(tl.where(mask, v, 0)) / units_here
    deviation = tl.where(mask, v - mean, 0)
    tl.store(at, mean, there)
    tl.store(at + PROGRAMS, row_sum(deviation * deviation), there)


@triton.jit
def publish(partials, row, v, program, mask, there, units_here, GATES: tl.constexpr, PROGRAMS: tl.constexpr):
    """For each gate the mean, and the sum of squared deviations from it, of this program's units."""
    at = partials + row * (8 * PROGRAMS) + program
    publish_one(at, v[0], mask, there, units_here, PROGRAMS)
    if GATES > 1:
        publish_one(at + 2 * PROGRAMS, v[1], mask, there, units_here, PROGRAMS)
        publish_one(at + 4 * PROGRAMS, v[2], mask, there, units_here, PROGRAMS)
    if GATES > 3:
        publish_one(at + 6 * PROGRAMS, v[3], mask, there, units_here, PROGRAMS)


@triton.jit
def load_partials(at, there, GATES: tl.constexpr, PROGRAMS: tl.constexpr):
    """By gates, of all programs (rows, programs)."""
    a = tl.load(at, there, other=0, cache_modifier=".cg")
    b = tl.zeros_like(a)
    c = tl.zeros_like(a)
    d = tl.zeros_like(a)
    if GATES > 1:
        b = tl.load(at + 2 * PROGRAMS, there, other=0, cache_modifier=".cg")
        c = tl.load(at + 4 * PROGRAMS, there, other=0, cache_modifier=".cg")
    if GATES > 3:
        d = tl.load(at + 6 * PROGRAMS, there, other=0, cache_modifier=".cg")
    return a, b, c, d


@triton.jit
def means_of_groups(v, UNITS: tl.constexpr, GATES: tl.constexpr, GROUPS: tl.constexpr, COUNTS: tl.constexpr):
    """As `gates.means`, of sums that are there already."""
    if GATES == 1:
        mean = v[0] / UNITS
        return mean, mean, mean, mean
    a = mean_of_group(v, UNITS, 0, GROUPS, COUNTS)
    b = mean_of_group(v, UNITS, 1, GROUPS, COUNTS)
    c = mean_of_group(v, UNITS, 2, GROUPS, COUNTS)
    d = c
    if GATES > 3:
        d = mean_of_group(v, UNITS, 3, GROUPS, COUNTS)
    return a, b, c, d


@triton.jit
def merged(
    partials,
    row,
    alive,
    UNITS: tl.constexpr,
    EPS: tl.constexpr,
    GATES: tl.constexpr,
    GROUPS: tl.constexpr,
    COUNTS: tl.constexpr,
    CENTER: tl.constexpr,
    SHARE: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK_PROGRAMS: tl.constexpr,
):
    """What all programs published: for each gate the mean over its group, and 1 / sqrt(var + eps); 0 of other rows."""
    program = tl.arange(0, BLOCK_PROGRAMS)[None, :]
    there = alive & (program < PROGRAMS)
    at = partials + row * (8 * PROGRAMS) + program
    m = load_partials(at, there, GATES, PROGRAMS)
    squares = load_partials(at + PROGRAMS, there, GATES, PROGRAMS)
    count = tl.maximum(tl.minimum(UNITS - program * SHARE, SHARE), 0).to(m[0].dtype)
    zero = row_sum(m[0]) * 0
    mean = (zero, zero, zero, zero)
    if CENTER:
        sums = (row_sum(m[0] * count), row_sum(m[1] * count), row_sum(m[2] * count), row_sum(m[3] * count))
        mean = means_of_groups(sums, UNITS, GATES, GROUPS, COUNTS)
    a = m[0] - mean[0]
    b = m[1] - mean[1]
    c = m[2] - mean[2]
    d = m[3] - mean[3]
    sums = (
        row_sum(squares[0] + count * a * a),
        row_sum(squares[1] + count * b * b),
        row_sum(squares[2] + count * c * c),
        row_sum(squares[3] + count * d * d),
    )
    var = means_of_groups(sums, UNITS, GATES, GROUPS, COUNTS)
    ra = tl.where(alive, 1.0 / tl.sqrt(var[0] + EPS), 0)
    rb = tl.where(alive, 1.0 / tl.sqrt(var[1] + EPS), 0)
    rc = tl.where(alive, 1.0 / tl.sqrt(var[2] + EPS), 0)
    rd = tl.where(alive, 1.0 / tl.sqrt(var[3] + EPS), 0)
    return mean, (ra, rb, rc, rd)


@triton.jit
def normed(v, mean, rstd):
    return (
        (v[0] - mean[0]) * rstd[0],
        (v[1] - mean[1]) * rstd[1],
        (v[2] - mean[2]) * rstd[2],
        (v[3] - mean[3]) * rstd[3],
    )


@triton.jit
def input_statistics(
    p_ptr,
    statistics,  # (rows, 8) in WIDE: becomes mean and 1 / sqrt(var + eps) of p, by gates
    UNITS: tl.constexpr,
    GATES: tl.constexpr,
    GROUPS: tl.constexpr,
    COUNTS: tl.constexpr,
    EPS: tl.constexpr,
    CENTER: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The statistics of one row's norm of the input term."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < UNITS
    a, b, c, d = load_gates(p_ptr, row * GATES * UNITS, UNITS, cols, mask, GATES, WIDE)
    zero = row_sum(a) * 0
    mean = (zero, zero, zero, zero)
    if CENTER:
        mean = means((a, b, c, d), UNITS, GATES, GROUPS, COUNTS)
    a = tl.where(mask, a - mean[0], 0)
    b = tl.where(mask, b - mean[1], 0)
    c = tl.where(mask, c - mean[2], 0)
    d = tl.where(mask, d - mean[3], 0)
    var = means((a * a, b * b, c * c, d * d), UNITS, GATES, GROUPS, COUNTS)
    at = statistics + row * 8
    tl.store(at, mean[0])
    tl.store(at + 1, mean[1])
    tl.store(at + 2, mean[2])
    tl.store(at + 3, mean[3])
    tl.store(at + 4, 1.0 / tl.sqrt(var[0] + EPS))
    tl.store(at + 5, 1.0 / tl.sqrt(var[1] + EPS))
    tl.store(at + 6, 1.0 / tl.sqrt(var[2] + EPS))
    tl.store(at + 7, 1.0 / tl.sqrt(var[3] + EPS))


@triton.jit
def four(at, alive):
    return (
        tl.load(at, alive, other=0),
        tl.load(at + 1, alive, other=0),
        tl.load(at + 2, alive, other=0),
        tl.load(at + 3, alive, other=0),
    )


@triton.jit
def load_share(ptr, share, unit, UNITS: tl.constexpr, OPERAND: tl.constexpr):
    """One gate's rows of W_hh of the units `share`, turned round: (units of h, share)."""
    return tl.load(ptr + share * UNITS + unit, (share < UNITS) & (unit < UNITS), other=0).to(OPERAND)


@triton.jit
def load_shares(
    ptr, share, first, UNITS: tl.constexpr, GATES: tl.constexpr, BLOCK: tl.constexpr, OPERAND: tl.constexpr
):
    """By gates, of some units of h from `first` on."""
    unit = first + tl.arange(0, BLOCK)[:, None]
    a = load_share(ptr, share, unit, UNITS, OPERAND)
    b = a
    c = a
    d = a
    if GATES > 1:
        b = load_share(ptr + UNITS * UNITS, share, unit, UNITS, OPERAND)
        c = load_share(ptr + 2 * UNITS * UNITS, share, unit, UNITS, OPERAND)
    if GATES > 3:
        d = load_share(ptr + 3 * UNITS * UNITS, share, unit, UNITS, OPERAND)
    return a, b, c, d


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
    WIDE: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """h of all programs, of some units: as they shared it, or from their o and c where the cell has a norm."""
    every = unit < UNITS
    h = tl.load(shares + of_o * UNITS + unit, alive & every, other=0, cache_modifier=".cg")
    if gain_c is not None:
        c = tl.load(shares + of_c * UNITS + unit, alive & every, other=0, cache_modifier=".cg")
        shown = (c - mean) * rstd * tl.load(gain_c + unit, every, other=0).to(WIDE)
        if bias_c is not None:
            shown += tl.load(bias_c + unit, every, other=0).to(WIDE)
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
    statistics,  # (rows, 8) in WIDE: see `input_statistics`, or None
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

    matrices = load_shares(weight_hh, cols, 0, UNITS, GATES, BLOCK, OPERAND)
    whole = tl.load(h0 + sample * UNITS + unit, exists & (unit < UNITS), other=0).to(OPERAND)
    if UNITS > BLOCK:
        second_matrices = load_shares(weight_hh, cols, BLOCK, UNITS, GATES, BLOCK, OPERAND)
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
        if gain_sum is not None:
            p = with_bias(plus(p, q), bias_inner, UNITS, cols, mask, GATES, WIDE)
            publish(partials, of_hidden, p, program, mask, alive, units_here, GATES, PROGRAMS)
            arrivals += PROGRAMS
            meet(counter, arrivals)
            mean, rstd = merged(
                partials, of_hidden, alive, UNITS, EPS, GATES, GROUPS, COUNTS, CENTER, SHARE, PROGRAMS, BLOCK_PROGRAMS
            )
            p = times(normed(p, mean, rstd), load_gates(gain_sum, 0, UNITS, cols, mask, GATES, WIDE))
            nothing = tl.zeros_like(h)
            q = (nothing, nothing, nothing, nothing)
        else:
            if gain_ih is not None:
                at = statistics + here * 8
                p = normed(p, four(at, alive), four(at + 4, alive))
                p = times(p, load_gates(gain_ih, 0, UNITS, cols, mask, GATES, WIDE))
            if gain_hh is not None:
                publish(partials, of_hidden, q, program, mask, alive, units_here, GATES, PROGRAMS)
                arrivals += PROGRAMS
                meet(counter, arrivals)
                mean, rstd = merged(
                    partials,
                    of_hidden,
                    alive,
                    UNITS,
                    EPS,
                    GATES,
                    GROUPS,
                    COUNTS,
                    CENTER,
                    SHARE,
                    PROGRAMS,
                    BLOCK_PROGRAMS,
                )
                q = times(normed(q, mean, rstd), load_gates(gain_hh, 0, UNITS, cols, mask, GATES, WIDE))
        q = with_bias(q, bias_hh, UNITS, cols, mask, GATES, WIDE)
        p = with_bias(p, bias_ih, UNITS, cols, mask, GATES, WIDE)
        if gain_c is not None:
            next_c = sigmoid(p[1] + q[1]) * c + sigmoid(p[0] + q[0]) * tanh(p[2] + q[2])
            o = sigmoid(p[3] + q[3])
            cs = (next_c, next_c, next_c, next_c)
            publish(partials, of_cell, cs, program, mask, alive, units_here, 1, PROGRAMS)
            tl.store(shares + of_hidden * UNITS + cols, o, now)
            tl.store(shares + of_cell * UNITS + cols, next_c, now)
            arrivals += PROGRAMS
            meet(counter, arrivals)
            mean, rstd = merged(partials, of_cell, alive, UNITS, EPS, 1, 0, 1, CENTER, SHARE, PROGRAMS, BLOCK_PROGRAMS)
            shown = (next_c - mean[0]) * rstd[0] * tl.load(gain_c + cols, mask, other=0).to(WIDE)
            if bias_c is not None:
                shown += tl.load(bias_c + cols, mask, other=0).to(WIDE)
            if CELL_NORM == "state":
                next_c = shown
            next_h = o * tanh(shown)
            cell_mean = mean[0]
            cell_rstd = rstd[0]
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
            shares, of_hidden, of_cell, cell_mean, cell_rstd, gain_c, bias_c, output, unit, alive, UNITS, WIDE, OPERAND
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
