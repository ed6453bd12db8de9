"""Statistics of a recurrent step's norms over a whole row, for programs that have a share of one: of what is known
before the steps begin."""

from __future__ import annotations

import triton
import triton.language as tl

from normwise.backends.triton.kernels.cells import lstm_cell, lstm_gates, statistics_of_cell
from normwise.backends.triton.kernels.gates import load_gates
from normwise.backends.triton.kernels.terms import normalized_terms, statistics_of_terms, terms_of

# Numbers of a row: mean and 1 / sqrt(var + eps), by gates, of the input term or the sum, and of the hidden term; and
# both of the cell.
NUMBERS = tl.constexpr(18)


@triton.jit
def store_four(at, v):
    tl.store(at, v[0])
    tl.store(at + 1, v[1])
    tl.store(at + 2, v[2])
    tl.store(at + 3, v[3])


@triton.jit
def load_four(at, alive):
    return (
        tl.load(at, alive, other=0),
        tl.load(at + 1, alive, other=0),
        tl.load(at + 2, alive, other=0),
        tl.load(at + 3, alive, other=0),
    )


@triton.jit
def load_statistics(statistics, row, alive):
    """Mean and 1 / sqrt(var + eps) of the input term or the sum, both of the hidden term, and both of the cell; where
    there are none, numbers that nobody reads."""
    if statistics is None:
        none = alive.to(tl.float32)
        four = (none, none, none, none)
        return four, four, four, four, none, none
    else:
        at = statistics + row * NUMBERS
        p_mean = load_four(at, alive)
        p_rstd = load_four(at + 4, alive)
        q_mean = load_four(at + 8, alive)
        q_rstd = load_four(at + 12, alive)
        return p_mean, p_rstd, q_mean, q_rstd, tl.load(at + 16, alive, other=0), tl.load(at + 17, alive, other=0)


@triton.jit
def statistics_of_rows(
    p_ptr,
    q_ptr,  # or None: of the input term alone
    c_ptr,  # or None
    bias_ih,
    bias_hh,
    gain_ih,
    gain_hh,
    gain_sum,
    bias_inner,
    gain_c,
    statistics,  # (rows, NUMBERS) in WIDE: become those of the norms that are there
    UNITS: tl.constexpr,
    GATES: tl.constexpr,
    GROUPS: tl.constexpr,
    COUNTS: tl.constexpr,
    EPS: tl.constexpr,
    CENTER: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < UNITS
    at = statistics + row * NUMBERS
    p = load_gates(p_ptr, row * GATES * UNITS, UNITS, cols, mask, GATES, WIDE)
    q = p
    if q_ptr is not None:
        q = load_gates(q_ptr, row * GATES * UNITS, UNITS, cols, mask, GATES, WIDE)
    p, q = normalized_terms(p, q, gain_sum, bias_inner, UNITS, cols, mask, GATES, WIDE)
    p_mean, p_rstd, q_mean, q_rstd = statistics_of_terms(
        p, q, gain_ih, gain_hh, gain_sum, UNITS, mask, EPS, GATES, GROUPS, COUNTS, CENTER
    )
    store_four(at, p_mean)
    store_four(at + 4, p_rstd)
    store_four(at + 8, q_mean)
    store_four(at + 12, q_rstd)
    if gain_c is not None:
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
        before = tl.load(c_ptr + row * UNITS + cols, mask, other=0)
        mean, rstd = statistics_of_cell(lstm_cell(lstm_gates(p, q), before), UNITS, mask, EPS, CENTER)
        tl.store(at + 16, mean)
        tl.store(at + 17, rstd)
