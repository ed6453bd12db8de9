"""What several kernels share: activations and their slopes, and sums of what several programs summed."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _limited(z, LOW: tl.constexpr, HIGH: tl.constexpr):
    """z between LOW and HIGH; NaN stays NaN."""
    z = tl.where(z < LOW, LOW, z)
    return tl.where(z > HIGH, HIGH, z)


@triton.jit
def _expm1(z):
    """exp(z) - 1 for z <= 0. Near 0 by Taylor's series at z / 4, and expm1(2 y) = m * (m + 2) with m = expm1(y)."""
    y = tl.where(z < -1.0, -1.0, z) * 0.25
    p = y * (1 / 39916800) + 1 / 3628800
    p = p * y + 1 / 362880
    p = p * y + 1 / 40320
    p = p * y + 1 / 5040
    p = p * y + 1 / 720
    p = p * y + 1 / 120
    p = p * y + 1 / 24
    p = p * y + 1 / 6
    p = p * y + 0.5
    m = y + y * (p * y)
    m = m * (m + 2.0)
    m = m * (m + 2.0)
    return tl.where(z < -1.0, tl.exp(z) - 1.0, m)


@triton.jit
def _log1p(u):
    """log(1 + u) = 2 artanh(s), s = u / (2 + u), by Taylor's series, for 0 <= u <= 1."""
    s = u / (u + 2.0)
    t = s * s
    p = t * (1 / 25) + 1 / 23
    p = p * t + 1 / 21
    p = p * t + 1 / 19
    p = p * t + 1 / 17
    p = p * t + 1 / 15
    p = p * t + 1 / 13
    p = p * t + 1 / 11
    p = p * t + 1 / 9
    p = p * t + 1 / 7
    p = p * t + 1 / 5
    p = p * t + 1 / 3
    return 2.0 * (s + s * (t * p))


@triton.jit
def activate(z, ACT: tl.constexpr):
    """act(z), by torch's formulas; NaN stays NaN. tanh is written as a logistic function, whose tail keeps digits."""
    if ACT == "relu":
        z = tl.where(z < 0, 0.0, z)
    elif ACT == "leaky_relu":
        z = tl.where(z > 0, z, z * 0.01)
    elif ACT == "silu":
        z = z / (1.0 + tl.exp(-z))
    elif ACT == "gelu":
        z = z * (0.5 + 0.5 * tl.erf(z * 0.7071067811865476))
    elif ACT == "sigmoid":
        z = 1.0 / (1.0 + tl.exp(-z))
    elif ACT == "relu6":
        z = _limited(z, 0.0, 6.0)
    elif ACT == "hardswish":
        z = z * (_limited(z + 3.0, 0.0, 6.0) * (1 / 6))
    elif ACT == "hardsigmoid":
        z = _limited(z + 3.0, 0.0, 6.0) * (1 / 6)
    elif ACT == "elu":
        z = tl.where(z > 0, z, _expm1(tl.where(z > 0, 0.0, z)))
    elif ACT == "gelu_tanh":
        z = z / (1.0 + tl.exp(-z * (1.5957691216057308 + 0.07135481627260025 * (z * z))))
    elif ACT == "softplus":
        z = tl.where(z > 20.0, z, tl.where(z < 0, 0.0, z) + _log1p(tl.exp(tl.where(z < 0, z, -z))))
    elif ACT == "mish":
        w = tl.exp(tl.where(z > 20.0, 20.0, z))
        n = w * (w + 2.0)
        z = z * (n / (n + 2.0))
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
    elif ACT == "sigmoid":
        s = 1.0 / (1.0 + tl.exp(-z))
        g = g * (s * (1.0 - s))
    elif ACT == "relu6":
        g = tl.where((z > 0) & (z < 6.0), g, 0.0)
    elif ACT == "hardswish":
        g = tl.where(z <= -3.0, 0.0, tl.where(z >= 3.0, g, g * (z * (1 / 3) + 0.5)))
    elif ACT == "hardsigmoid":
        g = tl.where((z > -3.0) & (z < 3.0), g * (1 / 6), 0.0)
    elif ACT == "elu":
        g = tl.where(z > 0, g, g * tl.exp(tl.where(z > 0, 0.0, z)))
    elif ACT == "gelu_tanh":
        z = _limited(z, -20.0, 20.0)  # beyond it is 0 or 1; the square of a large z would overflow
        square = z * z
        e = tl.exp(tl.where(z < 0, z, -z) * (1.5957691216057308 + 0.07135481627260025 * square))
        r = 1.0 / (1.0 + e)
        s = tl.where(z < 0, e * r, r)
        g = g * (s + e * r * r * (z * (1.5957691216057308 + 0.2140644488178008 * square)))
    elif ACT == "softplus":
        g = tl.where(z > 20.0, g, g / (1.0 + tl.exp(-z)))
    elif ACT == "mish":
        z = _limited(z, -1000.0, 20.0)
        w = tl.exp(z)
        n = w * (w + 2.0)
        r = 1.0 / (n + 2.0)
        g = g * (r * (n + 4.0 * z * (w * (w + 1.0) * r)))
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
    """sum_i[group, column] = the sum of parts_i over all parts of each group, in float64; a sum that is None is not
    wanted."""
    blocks = tl.cdiv(columns, BLOCK_COLUMNS)
    program = tl.program_id(0)
    group = (program // blocks).to(tl.int64)
    column = (program % blocks).to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = column < columns
    total_1 = tl.zeros([BLOCK_COLUMNS], tl.float64)
    total_2 = tl.zeros([BLOCK_COLUMNS], tl.float64)
    for start in range(0, parts, BLOCK_PARTS):
        part = start + tl.arange(0, BLOCK_PARTS).to(tl.int64)
        at = (group * parts + part)[:, None] * part_stride + column[None, :] * column_stride
        there = (part < parts)[:, None] & inside[None, :]
        if sum_1 is not None:
            total_1 += tl.sum(tl.load(parts_1 + at, mask=there, other=0).to(tl.float64), 0)
        if sum_2 is not None:
            total_2 += tl.sum(tl.load(parts_2 + at, mask=there, other=0).to(tl.float64), 0)
    if sum_1 is not None:
        tl.store(sum_1 + group * columns + column, in_dtype_of(sum_1, total_1), mask=inside)
    if sum_2 is not None:
        tl.store(sum_2 + group * columns + column, in_dtype_of(sum_2, total_2), mask=inside)
