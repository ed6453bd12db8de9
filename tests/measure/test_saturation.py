from __future__ import annotations

import pytest
import torch
from torch import nn

from normwise.lab.tasks.base import SATURATED
from normwise.measure.saturation import NONLINEARITIES, THRESHOLDS, Saturation, is_saturated, nonlinearity_of


@pytest.mark.parametrize("module", [nn.Sigmoid(), nn.Tanh(), nn.ReLU(), nn.ReLU6()], ids=repr)
def test_saturated_inputs_get_next_to_no_gradient(module):
    x = torch.linspace(-8, 5.9, 400, requires_grad=True)
    (slope,) = torch.autograd.grad(module(x).sum(), x)
    saturated = is_saturated(x, nonlinearity_of(module))
    assert saturated.any()
    assert slope[saturated].max() < 0.01
    assert slope[~saturated].min() >= 0.0024
    assert torch.equal(SATURATED[type(module)](x), saturated)


def test_only_those_with_a_threshold_have_a_saturation():
    assert nonlinearity_of(nn.GELU()) is nonlinearity_of(nn.LeakyReLU()) is None
    assert set(NONLINEARITIES.values()) == THRESHOLDS.keys()


def test_a_unit_is_dead_if_its_every_input_over_all_calls_is_saturated():
    found = Saturation()
    found.add(torch.tensor([[True, True, False], [True, True, False]]), unit_axis=1)
    found.add(torch.tensor([[[True], [True]], [[False], [True]], [[False], [False]]]), unit_axis=0)
    assert found.dead.tolist() == [True, False, False]
    assert (found.saturated, found.inputs, found.share) == (7, 12, 7 / 12)


@pytest.mark.parametrize("units", [1, 4])
def test_calls_without_units_or_values_count_no_unit(units):
    found = Saturation()
    assert found.share == 0
    found.add(torch.ones(3, dtype=torch.bool))
    found.add(torch.ones(0, units, dtype=torch.bool), unit_axis=1)
    assert found.dead.tolist() == []
    found.add(torch.ones(units, dtype=torch.bool), unit_axis=0)
    assert found.dead.tolist() == [True] * units
