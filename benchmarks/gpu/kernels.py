"""Kernels that measure the device and compute nothing. Imports Triton."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def barriers(counter, rounds, PROGRAMS: tl.constexpr):
    """All programs wait for one another `rounds` times, over a counter that starts from 0. They must all be there."""
    for n in range(rounds):
        tl.debug_barrier()
        seen = tl.atomic_add(counter, 1, sem="acq_rel") + 1
        while seen < (n + 1) * PROGRAMS:
            seen = tl.atomic_add(counter, 0, sem="acquire")
        tl.debug_barrier()


@triton.jit
def read_again(source, sums, blocks, rounds, BLOCK: tl.constexpr):
    """Each program reads the same `blocks` x BLOCK numbers `rounds` times, past its own cache."""
    program = tl.program_id(0)
    total = tl.zeros([BLOCK], tl.float32)
    for n in range(rounds * blocks):
        block = (n + program) % blocks
        total += tl.load(source + block * BLOCK + tl.arange(0, BLOCK), cache_modifier=".cg")
    tl.store(sums + program, tl.sum(total))
