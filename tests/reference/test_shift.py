from __future__ import annotations

import math

import pytest
import torch

from normwise.backends.reference import shift


def test_moved_by_half_a_deviation_whatever_the_order_of_the_values():
    values = torch.randn(3, 300) * torch.tensor([[1.0], [5.0], [0.1]])
    std = values.std(dim=1, correction=0, keepdim=True)
    assert shift.moved(values, (values + 0.5 * std)[:, torch.randperm(300)]) == pytest.approx(0.5, rel=1e-4)


def test_a_stretched_distribution():
    # E|X| of a standard normal is sqrt(2 / pi): stretched by 1.5, every quantile moves by half of itself.
    values = torch.randn(3, 4000)
    assert shift.moved(values, 1.5 * values) == pytest.approx(0.5 * math.sqrt(2 / math.pi), rel=0.05)


def test_constant_features_have_no_scale():
    values = torch.randn(1, 300)
    both = torch.cat([values, torch.ones(1, 300)])
    assert shift.moved(torch.ones(2, 5), torch.zeros(2, 5)) == 0
    assert shift.moved(both, 2 * both) == pytest.approx(shift.moved(values, 2 * values))


def test_a_gradient_that_is_turned_and_stretched():
    before, after = torch.tensor([3.0, 4.0]), torch.tensor([-8.0, 6.0])  # at a right angle, twice as long
    size, cosine = shift.changed(before, after)
    assert size == pytest.approx(math.sqrt(5))
    assert cosine == pytest.approx(0, abs=1e-6)
    assert shift.changed(torch.zeros(2), after) is None


@pytest.mark.parametrize(
    ("count", "most", "chosen"),
    [(1, 3, []), (0, 3, []), (3, 3, [1, 2]), (4, 3, [1, 2, 3]), (7, 3, [2, 4, 6]), (5, 2, [2, 4])],
)
def test_layers_evenly_spread_without_the_first(count, most, chosen):
    assert shift.spread(range(count), most) == chosen
