"""What programs that share the units of a tile of samples tell one another, and how they wait for it: the statistics of
a norm over all units, and what its backward takes from a gradient, from what each program has of them; and the share of
W_hh that each keeps.

Exchanged numbers are (rows, ..., programs), and merged in one order by all programs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from normwise.backends.triton.kernels.gates import load_gates, means, plus, row_sum, times
from normwise.backends.triton.kernels.terms import projections, reciprocal_deviations

# Numbers of a row and program in a backward: by gates, projections along the norm's values and means, of the gradient
# of the hidden term (or the sum) and of both vectors that the cell's norm takes from it; and both of the cell's norm.
ALONG_CELL = tl.constexpr(8)
MEAN_OF_CELL = tl.constexpr(16)
OF_CELL = tl.constexpr(24)
NUMBERS = tl.constexpr(26)


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
    wide: tl.constexpr = partials.dtype.element_ty
    m = load_gates(at, 0, 2 * PROGRAMS, 0, there, GATES, wide, ".cg")
    squares = load_gates(at, PROGRAMS, 2 * PROGRAMS, 0, there, GATES, wide, ".cg")
    count = tl.maximum(tl.minimum(UNITS - program * SHARE, SHARE), 0).to(wide)
    counts = (count, count, count, count)
    zero = row_sum(m[0]) * 0
    mean = (zero, zero, zero, zero)
    if CENTER:
        mean = means(times(m, counts), UNITS, GATES, GROUPS, COUNTS)
    deviations = (m[0] - mean[0], m[1] - mean[1], m[2] - mean[2], m[3] - mean[3])
    squares = plus(squares, times(counts, times(deviations, deviations)))
    ra, rb, rc, rd = reciprocal_deviations(means(squares, UNITS, GATES, GROUPS, COUNTS), EPS)
    return mean, (tl.where(alive, ra, 0), tl.where(alive, rb, 0), tl.where(alive, rc, 0), tl.where(alive, rd, 0))


@triton.jit
def publish_groups(at, v, there, GATES: tl.constexpr, GROUPS: tl.constexpr, PROGRAMS: tl.constexpr):
    """Numbers that all gates of a group have, once for each group: its gates are neighbours."""
    tl.store(at, v[0], there)
    if GATES > 1 and (GROUPS >> 2) & 3 != GROUPS & 3:
        tl.store(at + PROGRAMS, v[1], there)
    if GATES > 1 and (GROUPS >> 4) & 3 != (GROUPS >> 2) & 3:
        tl.store(at + 2 * PROGRAMS, v[2], there)
    if GATES > 3 and (GROUPS >> 6) & 3 != (GROUPS >> 4) & 3:
        tl.store(at + 3 * PROGRAMS, v[3], there)


@triton.jit
def total(at, there):
    """Of all programs."""
    return row_sum(tl.load(at, there, other=0, cache_modifier=".cg"))


@triton.jit
def totals_of_groups(at, there, GATES: tl.constexpr, GROUPS: tl.constexpr, PROGRAMS: tl.constexpr):
    a = total(at, there)
    b = a
    if GATES > 1 and (GROUPS >> 2) & 3 != GROUPS & 3:
        b = total(at + PROGRAMS, there)
    c = b
    if GATES > 1 and (GROUPS >> 4) & 3 != (GROUPS >> 2) & 3:
        c = total(at + 2 * PROGRAMS, there)
    d = c
    if GATES > 3 and (GROUPS >> 6) & 3 != (GROUPS >> 4) & 3:
        d = total(at + 3 * PROGRAMS, there)
    return a, b, c, d


@triton.jit
def publish_projections(
    at,
    dy,
    normed,
    there,
    UNITS: tl.constexpr,
    GATES: tl.constexpr,
    GROUPS: tl.constexpr,
    COUNTS: tl.constexpr,
    CENTER: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """What this program has of `projections`."""
    along, mean = projections(dy, normed, UNITS, GATES, GROUPS, COUNTS, CENTER)
    publish_groups(at, along, there, GATES, GROUPS, PROGRAMS)
    if CENTER:
        publish_groups(at + 4 * PROGRAMS, mean, there, GATES, GROUPS, PROGRAMS)


@triton.jit
def merged_projections(
    at, there, GATES: tl.constexpr, GROUPS: tl.constexpr, CENTER: tl.constexpr, PROGRAMS: tl.constexpr
):
    """`projections` of all units."""
    along = totals_of_groups(at, there, GATES, GROUPS, PROGRAMS)
    mean = along
    if CENTER:
        mean = totals_of_groups(at + 4 * PROGRAMS, there, GATES, GROUPS, PROGRAMS)
    return along, mean


@triton.jit
def load_share(ptr, share, unit, UNITS: tl.constexpr, COLUMNS: tl.constexpr, OPERAND: tl.constexpr):
    """One gate's rows of W_hh of the units `share`, turned round: (units of h, share); or, (units of the gate, share),
    its columns."""
    there = (share < UNITS) & (unit < UNITS)
    if COLUMNS:
        return tl.load(ptr + unit * UNITS + share, there, other=0).to(OPERAND)
    else:
        return tl.load(ptr + share * UNITS + unit, there, other=0).to(OPERAND)


@triton.jit
def load_shares(
    ptr,
    share,
    first,
    UNITS: tl.constexpr,
    GATES: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """By gates, of some units from `first` on."""
    unit = first + tl.arange(0, BLOCK)[:, None]
    a = load_share(ptr, share, unit, UNITS, COLUMNS, OPERAND)
    b = a
    c = a
    d = a
    if GATES > 1:
        b = load_share(ptr + UNITS * UNITS, share, unit, UNITS, COLUMNS, OPERAND)
        c = load_share(ptr + 2 * UNITS * UNITS, share, unit, UNITS, COLUMNS, OPERAND)
    if GATES > 3:
        d = load_share(ptr + 3 * UNITS * UNITS, share, unit, UNITS, COLUMNS, OPERAND)
    return a, b, c, d
