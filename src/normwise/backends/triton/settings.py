"""Launch settings of the kernels, from shape and dtype alone: nothing is tuned while a program runs, so that sums are
added up in the same order on every call and every machine.

None of these numbers was measured yet: they keep a thread at 8 to 16 elements in 4-byte registers.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    """A program of the forward takes `block_rows` rows, one of the backward `rows_per_program`, in such blocks."""

    block_rows: int
    block_cols: int
    rows_per_program: int
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


def of_rows(rows: int, cols: int, dtype: torch.dtype) -> Rows:
    block_cols = power_of_2(cols)
    block_rows = max(1, min(ELEMENTS_OF_TILE[dtype.itemsize] // block_cols, power_of_2(rows)))
    per_program = min(blocks(rows, PROGRAMS), MOST_ROWS_OF_PROGRAM)
    per_program = max(1, blocks(per_program, block_rows)) * block_rows
    num_warps = 4 if block_cols <= 2048 else 8 if block_cols <= 4096 else 16 if block_cols <= 8192 else 32
    return Rows(block_rows, block_cols, per_program, num_warps)


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
