"""The cells' equations, after the summed input: forward and backward, of a row or a tile of rows, as in `gates`."""

from __future__ import annotations

import triton
import triton.language as tl

from normwise.backends.triton.kernels.gates import sigmoid, tanh
from normwise.backends.triton.kernels.terms import projections, statistics


@triton.jit
def statistics_of_cell(c, UNITS: tl.constexpr, mask, EPS: tl.constexpr, CENTER: tl.constexpr):
    """Of one vector, for which it is more than enough to have one gate: its mean and 1 / sqrt(var + eps)."""
    c = tl.where(mask, c, 0)
    mean, rstd = statistics((c, c, c, c), UNITS, mask, EPS, 1, 0, 1, CENTER)
    return mean[0], rstd[0]


@triton.jit
def normed_cell(c, mean, rstd, mask, CENTER: tl.constexpr):
    if CENTER:
        c -= mean
    return tl.where(mask, c, 0) * rstd


@triton.jit
def projections_of_cell(dnormed, normed, UNITS: tl.constexpr, CENTER: tl.constexpr):
    """As `projections`, of the gradient of the norm's values."""
    dy = (dnormed, dnormed, dnormed, dnormed)
    along, mean = projections(dy, (normed, normed, normed, normed), UNITS, 1, 0, 1, CENTER)
    return along[0], mean[0]


@triton.jit
def projected_cell(dnormed, normed, rstd, along, mean, mask, CENTER: tl.constexpr):
    """The gradient of c from that of the norm's values."""
    d = dnormed - normed * along
    if CENTER:
        d = tl.where(mask, d - mean, 0)
    return d * rstd


@triton.jit
def shown_cell(normed, gain_c, bias_c, cols, mask, WIDE: tl.constexpr):
    """What the cell shows to its output: of its norm's values, after gain and bias."""
    shown = normed * tl.load(gain_c + cols, mask, other=0).to(WIDE)
    if bias_c is not None:
        shown += tl.load(bias_c + cols, mask, other=0).to(WIDE)
    return shown


@triton.jit
def lstm_gates(p, q):
    return sigmoid(p[0] + q[0]), sigmoid(p[1] + q[1]), tanh(p[2] + q[2]), sigmoid(p[3] + q[3])


@triton.jit
def lstm_cell(gates, before):
    return gates[1] * before + gates[0] * gates[2]


@triton.jit
def lstm_gate_gradients(gates, before, dc, do):
    """Of the summed inputs, linear in those of c and of the output gate."""
    i, f, g, o = gates
    return dc * g * i * (1.0 - i), dc * before * f * (1.0 - f), dc * i * (1.0 - g * g), do * o * (1.0 - o)


@triton.jit
def lstm_of_output(
    gates,
    before,
    dh,
    dc,
    mean,
    rstd,
    gain_c,
    bias_c,
    cols,
    mask,
    CENTER: tl.constexpr,
    CELL_NORM: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The gradient of the output gate; that of what the cell shows, and of its norm's values; what of the gradient of c
    does not come through the norm; and the norm's values."""
    shown = lstm_cell(gates, before)
    normed = tl.zeros_like(dh)
    if gain_c is not None:
        normed = normed_cell(shown, mean, rstd, mask, CENTER)
        shown = shown_cell(normed, gain_c, bias_c, cols, mask, WIDE)
    shown = tanh(shown)
    dshown = dh * gates[3] * (1.0 - shown * shown)
    dnormed = dshown
    if gain_c is not None:
        if CELL_NORM == "state":
            dshown += dc
            dc = tl.zeros_like(dh)
        dnormed = dshown * tl.load(gain_c + cols, mask, other=0).to(WIDE)
    else:
        dc += dshown
    return dh * shown, dshown, dnormed, dc, normed


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
        gates = lstm_gates(p, q)
        c = lstm_cell(gates, before)
        shown = c
        if gain_c is not None:
            mean, rstd = statistics_of_cell(c, UNITS, mask, EPS, CENTER)
            shown = shown_cell(normed_cell(c, mean, rstd, mask, CENTER), gain_c, bias_c, cols, mask, WIDE)
            if CELL_NORM == "state":
                c = shown
        h = gates[3] * tanh(shown)
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
        gates = lstm_gates(p, q)
        mean = nothing
        rstd = nothing
        if gain_c is not None:
            mean, rstd = statistics_of_cell(lstm_cell(gates, before), UNITS, mask, EPS, CENTER)
        do, dshown, dnormed, dc, normed = lstm_of_output(
            gates, before, dh, dc, mean, rstd, gain_c, bias_c, cols, mask, CENTER, CELL_NORM, WIDE
        )
        if gain_c is not None:
            along, of_mean = projections_of_cell(dnormed, normed, UNITS, CENTER)
            dc += projected_cell(dnormed, normed, rstd, along, of_mean, mask, CENTER)
        dbefore = dc * gates[1]
        dp = lstm_gate_gradients(gates, before, dc, do)
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
