"""What several kernels share: activations and their slopes, and sums of what several programs summed."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activate(z, ACT: tl.constexpr):
    """act(z), by torch's formulas; NaN stays NaN."""
    if ACT == "relu":
        z = tl.where(z < 0, 0.0, z)
    elif ACT == "leaky_relu":
        z = tl.where(z > 0, z, z * 0.01)
    elif ACT == "silu":
        z = z / (1.0 + tl.exp(-z))
    elif ACT == "gelu":
        z = z * (0.5 + 0.5 * tl.erf(z * 0.7071067811865476))
    return z


@triton.jit
def times_slope(g, z, ACT: tl.constexpr):
    """g times the derivative of act at z."""
    if ACT == "relu":
        g = tl.where(z <= 0, 0.0, g)
    elif ACT == "leaky_relu":
        g = tl.where(z > 0, g, g * 0.01)
    elif ACT == "silu":
        s = 1.0 / (1.0 + tl.exp(-z))
        g = g * (s * (1.0 + z * (1.0 - s)))
    elif ACT == "gelu":
        g = g * (0.5 + 0.5 * tl.erf(z * 0.7071067811865476) + z * (0.3989422804014327 * tl.exp(-0.5 * z * z)))
    return g


@triton.jit
def in_dtype_of(pointer, value):
    """`value` in float64 rounded to what `pointer` points at; half precision by way of float32."""
    if pointer.dtype.element_ty == tl.float64:
        return value
    else:
        return value.to(tl.float32).to(pointer.dtype.element_ty)


@triton.jit
def sum_of_parts(
    parts_1, parts_2, sum_1, sum_2, parts, columns, part_stride, column_stride,
    BLOCK_PARTS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """sum_i[column] = the sum of parts_i over all parts, in float64; a sum that is None is not wanted."""
    column = tl.program_id(0).to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = column < columns
    total_1 = tl.zeros([BLOCK_COLUMNS], tl.float64)
    total_2 = tl.zeros([BLOCK_COLUMNS], tl.float64)
    for start in range(0, parts, BLOCK_PARTS):
        part = start + tl.arange(0, BLOCK_PARTS).to(tl.int64)
        at = part[:, None] * part_stride + column[None, :] * column_stride
        there = (part < parts)[:, None] & inside[None, :]
        if sum_1 is not None:
            total_1 += tl.sum(tl.load(parts_1 + at, mask=there, other=0).to(tl.float64), 0)
        if sum_2 is not None:
            total_2 += tl.sum(tl.load(parts_2 + at, mask=there, other=0).to(tl.float64), 0)
    if sum_1 is not None:
        tl.store(sum_1 + column, in_dtype_of(sum_1, total_1), mask=inside)
    if sum_2 is not None:
        tl.store(sum_2 + column, in_dtype_of(sum_2, total_2), mask=inside)
