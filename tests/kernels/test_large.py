"""Outputs large enough to be written past the caches: the same numbers, whole, and visible to every thread."""

from __future__ import annotations

import pytest
import torch

from support import kernel_truth as truth
from support.kernel_checks import check_channels, check_groups, check_rows

# 4 MiB or more in each dtype, in runs that fill whole vectors; and once in runs that do not.
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cols", [1024, 1023])
def test_rows_past_the_caches_match_the_formula(isa: str, dtype: torch.dtype, cols: int) -> None:
    check_rows(2100, cols, dtype, threads=2, act="relu", residual=True, masked=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_channels_past_the_caches_match_the_formula(isa: str, dtype: torch.dtype, channels_last: bool) -> None:
    check_channels((8, 64, 64, 65), dtype, threads=2, channels_last=channels_last, masked=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(16, 3, 211, 211), (5, 24, 133, 133), (4200, 516)], ids=str)
def test_rows_of_channels_that_fill_no_cache_line_match_the_formula(
    isa: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    """Several of them are written as one run."""
    check_channels(shape, dtype, threads=2, channels_last=True, act="silu", residual=True)


@pytest.mark.parametrize("masked", [False, True])
def test_samples_that_begin_within_a_cache_line_match_the_formula(isa: str, masked: bool) -> None:
    check_groups((5, 24, 133, 133), 4, torch.float32, threads=2, channels_last=True, masked=masked)


def test_groups_past_the_caches_match_the_formula(isa: str) -> None:
    check_groups((8, 32, 64, 65), 4, truth.DTYPES[0], threads=2, residual=True, act="relu")
