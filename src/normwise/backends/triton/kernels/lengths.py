"""Which steps a sample has."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def valid_steps(lengths, valid, stride, steps, BLOCK: tl.constexpr):
    """valid[sample, step] = step < lengths[sample], as bytes."""
    sample = tl.program_id(0).to(tl.int64)
    step = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    length = tl.load(lengths + sample * stride).to(tl.int64)
    tl.store(valid + sample * steps + step, (step < length).to(tl.uint8), mask=step < steps)
