from __future__ import annotations

import math

import pytest
import torch

from normwise.measure.outliers import FeatureSizes, kurtosis


def test_kurtosis_goes_from_one_to_the_number_of_features():
    assert kurtosis(torch.full((64,), 7.0)) == pytest.approx(1.0)
    assert kurtosis(torch.eye(64)[3]) == pytest.approx(64.0)
    assert kurtosis(torch.zeros(64)) == 0.0
    # Sizes that are spread as a normal variable is: E x^4 / (E x^2)^2 = 3.
    assert kurtosis(torch.special.ndtri((torch.arange(100_000) + 0.5).double() / 100_000).square()) == pytest.approx(
        3.0, rel=1e-2
    )


def test_sizes_over_calls_are_those_of_all_together():
    x = torch.randn(6, 5, 16) * torch.arange(1, 17)
    sizes = FeatureSizes()
    for part in x.split(2):
        sizes.add(part)
    squares = x.double().square().mean((0, 1))
    assert sizes.squares.tolist() == pytest.approx(squares.tolist(), rel=1e-6)
    assert sizes.median == pytest.approx(float(squares.sqrt().median()), rel=1e-6)
    assert sizes.peak == float(x.abs().max())
    assert sizes.kurtosis == pytest.approx(float(squares.square().mean() / squares.mean() ** 2), rel=1e-6)


def test_the_typical_size_is_moved_by_no_single_position_and_no_padding():
    x = torch.randn(8, 21, 16)
    plain = FeatureSizes()
    plain.add(x)
    moved = x.clone()
    moved[:, 0] = 1e4
    moved[:, 15:] = 0.0
    sizes = FeatureSizes()
    sizes.add(moved)
    assert sizes.typical == pytest.approx(plain.typical, rel=0.1)
    assert sizes.peak == 1e4


def test_positions_that_are_not_finite_are_left_out():
    x = torch.ones(2, 3, 4)
    x[0, 1, 2] = math.nan
    x[1, 1, 2] = math.inf
    sizes = FeatureSizes()
    sizes.add(x)
    assert (sizes.positions, sizes.peak, sizes.kurtosis, sizes.typical) == (4, 1.0, 1.0, 1.0)
    sizes.add(torch.full((1, 1, 4), math.nan))
    assert sizes.positions == 4


def test_nothing_seen_is_nothing():
    sizes = FeatureSizes()
    assert (sizes.kurtosis, sizes.median, sizes.typical, sizes.peak) == (0.0, 0.0, 0.0, 0.0)
