"""Launch settings of the kernels, from shape and dtype alone: nothing is tuned while a program runs, so that sums are
added up in the same order on every call and every machine.

None of these numbers was measured yet: they keep a thread at 8 to 16 elements in 4-byte registers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from normwise.backends.triton.runtime import blocks, power_of_2

# Elements of a tile, by bytes of an element.
ELEMENTS_OF_TILE = {8: 1024, 4: 2048, 2: 2048}

# Programs that sum: about two for each multiprocessor of a large GPU.
PROGRAMS = 264

# Rows that one program of LayerNorm's backward adds up in one float32 variable a column.
MOST_ROWS_OF_PROGRAM = 512

# The most that a grid has along its second axis, on which blocks of channels lie.
MOST_BLOCKS = 65535

# Channels side by side in a tile where channels come last: at least a whole 128-byte line of them.
CHANNELS_OF_TILE = 64


@dataclass(frozen=True)
class Rows:
    """A program of the forward takes a block of rows, one of the backward several such blocks, all of one group: of the
    rows that have one gain and bias.

    Attributes:
        blocks: of a group, in the forward.
        parts: of a group, in the backward, a program for each: their sums are added up if there is more than one.
        slots: where groups are so small that a block has several: how many places each has, a power of 2. Then `blocks`
            is their number in all, and a program of the backward takes one too.
    """

    block_rows: int
    block_cols: int
    rows_per_program: int
    blocks: int
    parts: int
    slots: int | None
    num_warps: int


@dataclass(frozen=True)
class Tiles:
    """Of a tensor (samples, channels, positions): tiles of some channels and positions of one sample.

    A part is what one program sums of a block of channels: `samples_per_part` samples and `positions_per_part`
    positions, of which a sample has `chunks`.
    """

    block_channels: int
    block_positions: int
    samples_per_part: int
    positions_per_part: int
    chunks: int
    parts: int
    num_warps: int = 8


@dataclass(frozen=True)
class Recurrent:
    """How recurrences are computed.

    Attributes:
        designs: modules of `rnn`, of which the first one that takes a call runs; "stepwise" takes all, and comes last
            in any case.
        samples: of one program of "persistent" and "grid": the rows of a tensor core's tile.
        persistent_units: the most units of which W_hh stays on chip in one program, by bytes of an element.
        grid_units: the most units of "grid", by bytes of an element: twice those of h in one product.
        share: units of which one program of "grid" keeps the rows of W_hh.
        multiprocessors: how many programs of "grid" run at once where no GPU is there to be asked.
        row_programs: the most programs that compute rows once all steps are done.
    """

    designs: tuple[str, ...] = ("persistent",)
    samples: int = 16
    persistent_units: tuple[tuple[int, int], ...] = ((2, 128), (4, 64), (8, 0))
    grid_units: tuple[tuple[int, int], ...] = ((2, 512), (4, 256), (8, 0))
    share: int = 16
    multiprocessors: int = 1
    row_programs: int = 4 * PROGRAMS


_recurrent = Recurrent()


def recurrent() -> Recurrent:
    """The settings in force."""
    return _recurrent


@contextmanager
def recurrent_settings(**changes: Any) -> Iterator[Recurrent]:
    """Other settings for a while, of all threads: for tests and benchmarks."""
    global _recurrent
    before = _recurrent
    _recurrent = replace(before, **changes)
    try:
        yield _recurrent
    finally:
        _recurrent = before


def of_rows(rows: int, cols: int, dtype: torch.dtype, group_rows: int) -> Rows:
    """`group_rows` neighbours each have one gain and bias."""
    block_cols = power_of_2(cols)
    num_warps = 4 if block_cols <= 2048 else 8 if block_cols <= 4096 else 16 if block_cols <= 8192 else 32
    groups, slots = blocks(rows, group_rows), power_of_2(group_rows)
    most = max(1, ELEMENTS_OF_TILE[dtype.itemsize] // block_cols)
    if groups > 1 and slots <= most:
        block_rows = min(most, power_of_2(groups) * slots)
        return Rows(block_rows, block_cols, block_rows, blocks(groups * slots, block_rows), 1, slots, num_warps)
    block_rows = min(most, slots)
    per_program = min(blocks(group_rows, max(1, PROGRAMS // groups)), MOST_ROWS_OF_PROGRAM)
    per_program = max(1, blocks(per_program, block_rows)) * block_rows
    parts = blocks(group_rows, per_program)
    return Rows(block_rows, block_cols, per_program, blocks(group_rows, block_rows), parts, None, num_warps)


def of_tiles(
    samples: int, channels: int, positions: int, channels_last: bool, by_sample: bool, dtype: torch.dtype
) -> Tiles:
    """`by_sample`: statistics are of one sample, so that a part may not hold two."""
    samples, channels, positions = max(samples, 1), max(channels, 1), max(positions, 1)
    elements = ELEMENTS_OF_TILE[dtype.itemsize]
    if channels_last:
        block_channels = min(power_of_2(channels), CHANNELS_OF_TILE)
        block_positions = min(power_of_2(positions), elements // block_channels)
    else:
        block_positions = min(power_of_2(positions), elements // power_of_2(blocks(channels, MOST_BLOCKS)))
        block_channels = min(power_of_2(channels), elements // block_positions)
    wanted = max(1, PROGRAMS // blocks(channels, block_channels))
    samples_per_part = 1 if by_sample else max(1, blocks(samples, wanted))
    chunks = min(blocks(positions, block_positions), blocks(wanted, samples))
    positions_per_part = blocks(blocks(positions, block_positions), chunks) * block_positions
    chunks = blocks(positions, positions_per_part)
    parts = blocks(samples, samples_per_part) * chunks
    return Tiles(block_channels, block_positions, samples_per_part, positions_per_part, chunks, parts)
