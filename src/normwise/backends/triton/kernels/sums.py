"""Sums over rows of the gradients of gains and biases of a recurrent step, in memory that no other program touches."""

from __future__ import annotations

import triton
import triton.language as tl

from normwise.backends.triton.kernels.gates import add_gates, times


@triton.jit
def add_sums(
    sums,
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
    UNITS: tl.constexpr,
    cols,
    mask,
    CELL: tl.constexpr,
    GATES: tl.constexpr,
    RESET_AFTER: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One row's share of the gradients of gains and biases (but the one inside a norm), added to the sums of
    `rnn.requests.SUMS`: from the gradients of the input term (or the sum) `d`, of the hidden term, and of what the cell
    shows to its output."""
    if bias_ih is not None or bias_hh is not None:
        add_gates(sums, 0, UNITS, cols, mask, d, GATES, WIDE)
        if CELL == "gru" and RESET_AFTER:
            at = sums + 3 * GATES * UNITS + cols
            tl.store(at, tl.load(at, mask, other=0) + d_hidden[2], mask)
    if gain_sum is not None:
        add_gates(sums, GATES * UNITS, UNITS, cols, mask, times(d, p_normed), GATES, WIDE)
    else:
        if gain_hh is not None:
            add_gates(sums, GATES * UNITS, UNITS, cols, mask, times(d_hidden, q_normed), GATES, WIDE)
        if gain_ih is not None:
            add_gates(sums, 2 * GATES * UNITS, UNITS, cols, mask, times(d, p_normed), GATES, WIDE)
    if gain_c is not None:
        at = sums + (3 * GATES + 1) * UNITS + cols
        tl.store(at, tl.load(at, mask, other=0) + dshown * cell_normed, mask)
        if bias_c is not None:
            at += UNITS
            tl.store(at, tl.load(at, mask, other=0) + dshown, mask)


@triton.jit
def add_inner_sums(sums, dq, bias_inner, UNITS: tl.constexpr, cols, mask, GATES: tl.constexpr, WIDE: tl.constexpr):
    """The same of the bias inside the norm over the sum, from the gradient of q."""
    if bias_inner is not None:
        add_gates(sums, 2 * GATES * UNITS, UNITS, cols, mask, dq, GATES, WIDE)
