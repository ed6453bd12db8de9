"""The cells' equations, after the summed input: forward and backward, of a row or a tile of rows, as in `gates`."""

from __future__ import annotations

import triton
import triton.language as tl

from normwise.backends.triton.kernels.gates import sigmoid, standardize, standardize_backward, tanh


@triton.jit
def standardize_cell(c, UNITS: tl.constexpr, mask, EPS: tl.constexpr, CENTER: tl.constexpr):
    """One vector, for which it is more than enough to have one gate."""
    normed, rstd = standardize((c, c, c, c), UNITS, mask, EPS, 1, 0, 1, CENTER)
    return normed[0], rstd[0]


@triton.jit
def gru_gates(p, q, UPDATE_OFFSET: tl.constexpr, RESET_AFTER: tl.constexpr):
    """r, z and the candidate n, and what r multiplies."""
    r = sigmoid(p[0] + q[0])
    z = sigmoid(p[1] + q[1] + UPDATE_OFFSET)
    if RESET_AFTER:
        gated = q[2]
        n = tanh(p[2] + r * gated)
    else:
        gated = p[2] + q[2]
        n = tanh(r * gated)
    return r, z, n, gated


@triton.jit
def cell_forward(
    p,
    q,
    before,  # c of an LSTM before the step, h of a GRU; in WIDE
    gain_c,
    bias_c,
    UNITS: tl.constexpr,
    cols,
    mask,
    EPS: tl.constexpr,
    CENTER: tl.constexpr,
    CELL: tl.constexpr,
    CELL_NORM: tl.constexpr,
    RESET_AFTER: tl.constexpr,
    PAPER_GATE: tl.constexpr,
    UPDATE_OFFSET: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The input and the hidden term -> h, and c of an LSTM."""
    c = tl.zeros_like(p[0])
    if CELL == "lstm":
        c = sigmoid(p[1] + q[1]) * before + sigmoid(p[0] + q[0]) * tanh(p[2] + q[2])
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
        h = z * before + (1.0 - z) * n
    elif CELL == "rnn_tanh":
        h = tanh(p[0] + q[0])
    else:
        h = p[0] + q[0]
        h = tl.where(h > 0, h, h * 0)  # NaN stays
    return h, c


@triton.jit
def cell_backward(
    p,
    q,
    before,
    dh,
    dc,  # of an LSTM's c after the step
    gain_c,
    bias_c,
    UNITS: tl.constexpr,
    cols,
    mask,
    EPS: tl.constexpr,
    CENTER: tl.constexpr,
    CELL: tl.constexpr,
    CELL_NORM: tl.constexpr,
    RESET_AFTER: tl.constexpr,
    PAPER_GATE: tl.constexpr,
    UPDATE_OFFSET: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The gradients of the input and of the hidden term; what of the gradient of `before` does not come through q; and
    where the cell has a norm the gradient of its result after gain and bias, and that result before them."""
    nothing = tl.zeros_like(dh)
    dbefore = nothing
    dshown = nothing
    normed = nothing
    if CELL == "lstm":
        i = sigmoid(p[0] + q[0])
        f = sigmoid(p[1] + q[1])
        g = tanh(p[2] + q[2])
        o = sigmoid(p[3] + q[3])
        c = f * before + i * g
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
            d = dshown * gain
            d, _, _, _ = standardize_backward(
                (d, d, d, d), (normed, normed, normed, normed), (rstd, rstd, rstd, rstd), UNITS, mask, 1, 0, 1, CENTER
            )
            dc += d
        else:
            dc += dshown
        dbefore = dc * f
        dp = (dc * g * i * (1.0 - i), dc * before * f * (1.0 - f), dc * i * (1.0 - g * g), dh * shown * o * (1.0 - o))
        dq = dp
    elif CELL == "gru":
        r, z, n, gated = gru_gates(p, q, UPDATE_OFFSET, RESET_AFTER)
        dz = dh * (before - n) * z * (1.0 - z)
        keep = z
        if PAPER_GATE:
            dz = -dz
            keep = 1.0 - z
        dbefore = dh * keep
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
    return dp, dq, dbefore, dshown, normed
