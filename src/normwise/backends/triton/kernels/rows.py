"""LayerNorm and RMSNorm of rows (rows, cols), each held whole in registers.

WIDE is the dtype of the arithmetic: float32, or float64 for float64. `mask` has a byte for each row, or for each
element (BY_ELEMENT). Pointers that are None stand for tensors that are not there.
"""

from __future__ import annotations

import triton
import triton.language as tl

from normwise.backends.triton.kernels.common import activate, times_slope


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
    x, residual, mask, weight, bias, total, y, stats, rows, cols,
    EPS: tl.constexpr, CENTER: tl.constexpr, ACT: tl.constexpr, BY_ELEMENT: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """y = act((t - mean) * rstd * weight + bias) with t = x + residual, which is stored in `total` if it is a sum.

    The mean is subtracted twice, first a rough one and then the mean of what is left: one rounded to float32 would
    leave its error in every element.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    col = tl.arange(0, BLOCK_COLS)
    inside = (row < rows)[:, None] & (col < cols)[None, :]
    at = row[:, None] * cols + col[None, :]
    valid = _valid(mask, row, at, inside, BY_ELEMENT)
    t = tl.load(x + at, mask=valid, other=0).to(WIDE)
    if residual is not None:
        t += tl.load(residual + at, mask=valid, other=0).to(WIDE)
        t = t.to(total.dtype.element_ty)
        tl.store(total + at, t, mask=inside)
        t = t.to(WIDE)

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
        tl.store(stats + row, mean, mask=row < rows)
        tl.store(stats + rows + row, rstd.to(tl.float64), mask=row < rows)

    z = t * rstd[:, None]
    if weight is not None:
        z = z * tl.load(weight + col, mask=col < cols, other=0).to(WIDE)[None, :]
    if bias is not None:
        z = z + tl.load(bias + col, mask=col < cols, other=0).to(WIDE)[None, :]
    z = activate(z, ACT)
    tl.store(y + at, tl.where(valid, z, 0.0), mask=inside)


@triton.jit
def rows_backward(
    dy, dtotal, total, mask, weight, bias, stats, dx, dweight_parts, dbias_parts, rows, cols, rows_per_program,
    CENTER: tl.constexpr, ACT: tl.constexpr, BY_ELEMENT: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """dx = rstd * (g - E[g] - z * E[g z]) + dtotal with g = dy * act' * weight, and what this program's rows add to
    the gradients of gain and bias: one row of (programs, cols) each."""
    program = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK_COLS)
    dweight = tl.zeros([BLOCK_COLS], WIDE)
    dbias = tl.zeros([BLOCK_COLS], WIDE)
    if weight is not None:
        w = tl.load(weight + col, mask=col < cols, other=0).to(WIDE)
    if bias is not None:
        b = tl.load(bias + col, mask=col < cols, other=0).to(WIDE)
    for start in range(0, rows_per_program, BLOCK_ROWS):
        row = program * rows_per_program + start + tl.arange(0, BLOCK_ROWS)
        inside = (row < rows)[:, None] & (col < cols)[None, :]
        at = row[:, None] * cols + col[None, :]
        valid = _valid(mask, row, at, inside, BY_ELEMENT)
        mean = tl.load(stats + row, mask=row < rows, other=0)
        rstd = tl.load(stats + rows + row, mask=row < rows, other=0).to(WIDE)
        z = tl.load(total + at, mask=valid, other=0).to(WIDE)
        if CENTER:
            near = mean.to(WIDE)
            rest = (mean - near.to(tl.float64)).to(WIDE)
            z = (z - near[:, None]) - rest[:, None]
        z = tl.where(valid, z * rstd[:, None], 0.0)
        g = tl.load(dy + at, mask=valid, other=0).to(WIDE)
        if ACT is not None:
            before = z
            if weight is not None:
                before = before * w[None, :]
            if bias is not None:
                before = before + b[None, :]
            g = tl.where(valid, times_slope(g, before, ACT), 0.0)
        if dweight_parts is not None:
            dweight += tl.sum(g * z, 0)
        if dbias_parts is not None:
            dbias += tl.sum(g, 0)
        if weight is not None:
            g = g * w[None, :]
        count = _counted(mask, valid, cols, WIDE, BLOCK_ROWS)
        d = g - z * (tl.sum(g * z, 1) / count)[:, None]
        if CENTER:
            d -= (tl.sum(g, 1) / count)[:, None]
        d = d * rstd[:, None]
        if dtotal is not None:
            d += tl.load(dtotal + at, mask=valid, other=0).to(WIDE)
        tl.store(dx + at, tl.where(valid, d, 0.0), mask=inside)
    if dweight_parts is not None:
        tl.store(dweight_parts + program * cols + col, dweight, mask=col < cols)
    if dbias_parts is not None:
        tl.store(dbias_parts + program * cols + col, dbias, mask=col < cols)
