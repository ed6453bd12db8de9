"""LayerNorm and RMSNorm of rows (rows, cols), each held whole in registers, with a gate that multiplies behind the norm
or before it.

WIDE is the dtype of the arithmetic: float32, or float64 for float64. `mask` has a byte for each row, or for each
element (BY_ELEMENT). Pointers that are None stand for tensors that are not there.

With `group_rows` so many neighbouring rows have a gain and bias of their own. A program then takes one of `parts` parts
of a group; or, with SLOTS, whole groups, each in so many places of a block, of which `group_rows` are taken.
"""

from __future__ import annotations

import triton
import triton.language as tl

from normwise.backends.triton.kernels.common import activate, in_dtype_of, times_slope


@triton.jit
def _rows_of_block(
    start, rows_per_program, rows, group_rows, parts, SLOTS: tl.constexpr, BLOCK_ROWS: tl.constexpr
):  # fmt: skip
    """Of this program's block at `start`: its rows, which of them there are, and the group of each, or of all."""
    program = tl.program_id(0)
    place = start + tl.arange(0, BLOCK_ROWS)
    if group_rows is None:
        row = program.to(tl.int64) * rows_per_program + place
        return row, row < rows, program.to(tl.int64) * 0
    elif SLOTS is None:
        group = (program // parts).to(tl.int64)  # divided as int32: a division of int64 is a call, and takes registers
        place = (program % parts).to(tl.int64) * rows_per_program + place
        return group * group_rows + place, place < group_rows, group
    else:
        place = program.to(tl.int64) * rows_per_program + place
        groups = place // SLOTS
        place -= groups * SLOTS
        row = groups * group_rows + place
        return row, (place < group_rows) & (row < rows), groups


@triton.jit
def _gain(gain, group, there, col, cols, SLOTS: tl.constexpr, WIDE: tl.constexpr):
    """The gain or bias of a block: one row of it for all, or one for each."""
    if SLOTS is None:
        return tl.load(gain + group * cols + col, mask=col < cols, other=0).to(WIDE)[None, :]
    else:
        at = group[:, None] * cols + col[None, :]
        return tl.load(gain + at, mask=there[:, None] & (col < cols)[None, :], other=0).to(WIDE)


@triton.jit
def _store_by_group(
    gradient, terms, col, rows, cols, group_rows,
    SLOTS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """Sums of a block's terms over the rows of each of its groups."""
    GROUPS: tl.constexpr = BLOCK_ROWS // SLOTS
    if SLOTS > 1:
        terms = tl.sum(tl.reshape(terms, [GROUPS, SLOTS, BLOCK_COLS]), 1)
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    inside = (group * group_rows < rows)[:, None] & (col < cols)[None, :]
    tl.store(gradient + group[:, None] * cols + col[None, :], in_dtype_of(gradient, terms), mask=inside)


@triton.jit
def _valid(mask, row, at, inside, BY_ELEMENT: tl.constexpr):
    """Which elements of a block count."""
    if mask is None:
        return inside
    elif BY_ELEMENT:
        return tl.load(mask + at, mask=inside, other=0) != 0
    else:
        return inside & (tl.load(mask + row[:, None] + 0 * at, mask=inside, other=0) != 0)


@triton.jit
def _counted(mask, valid, cols, WIDE: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """How many elements of each row count, at least 1."""
    if mask is None:
        return tl.zeros([BLOCK_ROWS], WIDE) + cols
    else:
        return tl.maximum(tl.sum(valid.to(WIDE), 1), 1.0)


@triton.jit
def rows_forward(
    x, residual, mask, weight, bias, gate, total, y, stats, rows, cols, group_rows, parts,
    EPS: tl.constexpr, CENTER: tl.constexpr, ACT: tl.constexpr, GATE_ACT: tl.constexpr, GATE_FIRST: tl.constexpr,
    SLOTS: tl.constexpr, BY_ELEMENT: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """y = act((t - mean) * rstd * weight + bias) with t = x + residual, which is stored in `total` if it is a sum.

    A gate opened = gate_act(gate) multiplies what act is of, or with GATE_FIRST what is normalized.

    The mean is subtracted twice, first a rough one and then the mean of what is left: one rounded to float32 would
    leave its error in every element.
    """
    row, there, group = _rows_of_block(0, BLOCK_ROWS, rows, group_rows, parts, SLOTS, BLOCK_ROWS)
    col = tl.arange(0, BLOCK_COLS)
    inside = there[:, None] & (col < cols)[None, :]
    at = row[:, None] * cols + col[None, :]
    valid = _valid(mask, row, at, inside, BY_ELEMENT)
    t = tl.load(x + at, mask=valid, other=0).to(WIDE)
    if residual is not None:
        t += tl.load(residual + at, mask=valid, other=0).to(WIDE)
        t = t.to(total.dtype.element_ty)
        tl.store(total + at, t, mask=inside)
        t = t.to(WIDE)
    if GATE_FIRST:
        t = t * activate(tl.load(gate + at, mask=valid, other=0).to(WIDE), GATE_ACT)

    count = _counted(mask, valid, cols, WIDE, BLOCK_ROWS)
    if CENTER:
        rough = tl.sum(t, 1) / count
        t = tl.where(valid, t - rough[:, None], 0.0)
        rest = tl.sum(t, 1) / count
        t = tl.where(valid, t - rest[:, None], 0.0)
        mean = rough.to(tl.float64) + rest.to(tl.float64)
    else:
        mean = tl.zeros([BLOCK_ROWS], tl.float64)
    var = tl.sum(t * t, 1) / count
    # A variance that has left the range gives NaN: 1 over infinity would make zeros of an input that exploded.
    rstd = tl.rsqrt(var + EPS) + var * 0.0
    if stats is not None:
        tl.store(stats + row, mean, mask=there)
        tl.store(stats + rows + row, rstd.to(tl.float64), mask=there)

    z = t * rstd[:, None]
    if weight is not None:
        z = z * _gain(weight, group, there, col, cols, SLOTS, WIDE)
    if bias is not None:
        z = z + _gain(bias, group, there, col, cols, SLOTS, WIDE)
    if gate is not None and not GATE_FIRST:
        z = z * activate(tl.load(gate + at, mask=valid, other=0).to(WIDE), GATE_ACT)
    z = activate(z, ACT)
    tl.store(y + at, tl.where(valid, z, 0.0), mask=inside)


@triton.jit
def rows_backward(
    dy, dtotal, total, mask, weight, bias, gate, stats, dx, dgate, dweight, dbias,
    rows, cols, rows_per_program, group_rows, parts,
    CENTER: tl.constexpr, ACT: tl.constexpr, GATE_ACT: tl.constexpr, GATE_FIRST: tl.constexpr,
    SLOTS: tl.constexpr, BY_ELEMENT: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """dx = rstd * (g - E[g] - z * E[g z]) + dtotal with g = dy * act' * weight, and what this program's rows add to
    the gradients of gain and bias: one row of (programs, cols) each; with SLOTS one for each group.

    dgate is the upstream gradient of opened, in y or in t, times the slope of gate_act.
    """
    program = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK_COLS)
    row, there, group = _rows_of_block(0, rows_per_program, rows, group_rows, parts, SLOTS, BLOCK_ROWS)
    if SLOTS is None:
        sum_weight = tl.zeros([BLOCK_COLS], WIDE)
        sum_bias = tl.zeros([BLOCK_COLS], WIDE)
    if weight is not None:
        w = _gain(weight, group, there, col, cols, SLOTS, WIDE)
    if bias is not None:
        b = _gain(bias, group, there, col, cols, SLOTS, WIDE)
    for start in range(0, rows_per_program, BLOCK_ROWS):
        row, there, group = _rows_of_block(start, rows_per_program, rows, group_rows, parts, SLOTS, BLOCK_ROWS)
        inside = there[:, None] & (col < cols)[None, :]
        at = row[:, None] * cols + col[None, :]
        valid = _valid(mask, row, at, inside, BY_ELEMENT)
        mean = tl.load(stats + row, mask=there, other=0)
        rstd = tl.load(stats + rows + row, mask=there, other=0).to(WIDE)
        z = tl.load(total + at, mask=valid, other=0).to(WIDE)
        if GATE_FIRST:
            z = z * activate(tl.load(gate + at, mask=valid, other=0).to(WIDE), GATE_ACT)
        if CENTER:
            near = mean.to(WIDE)
            rest = (mean - near.to(tl.float64)).to(WIDE)
            z = (z - near[:, None]) - rest[:, None]
        z = tl.where(valid, z * rstd[:, None], 0.0)
        g = tl.load(dy + at, mask=valid, other=0).to(WIDE)
        if ACT is not None or (gate is not None and not GATE_FIRST):
            before = z
            if weight is not None:
                before = before * w
            if bias is not None:
                before = before + b
            if gate is not None and not GATE_FIRST:
                shut = tl.load(gate + at, mask=valid, other=0).to(WIDE)
                opened = activate(shut, GATE_ACT)
                if ACT is not None:
                    g = times_slope(g, before * opened, ACT)
                tl.store(dgate + at, tl.where(valid, times_slope(g * before, shut, GATE_ACT), 0.0), mask=inside)
                g = tl.where(valid, g * opened, 0.0)
            else:
                g = tl.where(valid, times_slope(g, before, ACT), 0.0)
        if dweight is not None:
            if SLOTS is None:
                sum_weight += tl.sum(g * z, 0)
            else:
                _store_by_group(dweight, g * z, col, rows, cols, group_rows, SLOTS, BLOCK_ROWS, BLOCK_COLS)
        if dbias is not None:
            if SLOTS is None:
                sum_bias += tl.sum(g, 0)
            else:
                _store_by_group(dbias, g, col, rows, cols, group_rows, SLOTS, BLOCK_ROWS, BLOCK_COLS)
        if weight is not None:
            g = g * w
        count = _counted(mask, valid, cols, WIDE, BLOCK_ROWS)
        d = g - z * (tl.sum(g * z, 1) / count)[:, None]
        if CENTER:
            d -= (tl.sum(g, 1) / count)[:, None]
        d = d * rstd[:, None]
        if GATE_FIRST:
            # Loaded again, in a way by which the compiler does not keep them in the registers of two more rows.
            shut = tl.load(gate + at, mask=valid, other=0, eviction_policy="evict_first").to(WIDE)
            t = tl.load(total + at, mask=valid, other=0, eviction_policy="evict_first").to(WIDE)
            tl.store(dgate + at, tl.where(valid, times_slope(d * t, shut, GATE_ACT), 0.0), mask=inside)
            d = d * activate(shut, GATE_ACT)
        if dtotal is not None:
            d += tl.load(dtotal + at, mask=valid, other=0).to(WIDE)
        tl.store(dx + at, tl.where(valid, d, 0.0), mask=inside)
    if SLOTS is None:
        if dweight is not None:
            tl.store(dweight + program * cols + col, in_dtype_of(dweight, sum_weight), mask=col < cols)
        if dbias is not None:
            tl.store(dbias + program * cols + col, in_dtype_of(dbias, sum_bias), mask=col < cols)
