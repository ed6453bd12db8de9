from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from normwise.measure.gradients import gradient_norm, loss_and_gradients, root_mean, squared_norm, total_norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_the_norm_of_a_vanishing_or_exploding_gradient(dtype, scale):
    gradient = (torch.tensor([3.0, -4.0, 0.0]) * scale).to(dtype)
    assert gradient_norm(gradient) == pytest.approx(5 * scale, rel=1e-2 if dtype is torch.bfloat16 else 1e-6)
    assert total_norm([gradient[:1], gradient[1:]]) == pytest.approx(gradient_norm(gradient))


def test_total_norm_of_nothing_and_of_what_is_not_finite():
    assert total_norm([]) == 0
    inf, nan = torch.tensor([math.inf]), torch.tensor([math.nan])
    assert total_norm([inf, torch.ones(2)]) == math.inf
    assert math.isnan(total_norm([inf, nan]))


def test_a_square_that_is_too_large_is_infinite():
    assert squared_norm(torch.tensor([1e200], dtype=torch.float64)) == math.inf


def test_root_mean_of_squared_norms():
    assert root_mean([9.0, 16.0, 2.0]) == 3


def test_gradients_are_of_what_the_loss_depends_on():
    """`.grad` is left alone, and the caller may have gradients off."""
    used, unused, fixed = nn.Linear(2, 1), nn.Linear(2, 1), nn.Linear(2, 1).requires_grad_(False)
    x = torch.randn(3, 2)
    parameters = dict(nn.ModuleDict({"used": used, "unused": unused, "fixed": fixed}).named_parameters())
    with torch.no_grad():
        value, found = loss_and_gradients(lambda: (used(x) + fixed(x)).sum(), parameters)
    assert value == pytest.approx(float((used(x) + fixed(x)).sum().detach()))
    assert found.keys() == {"used.weight", "used.bias"}
    torch.testing.assert_close(found["used.weight"], x.sum(0, keepdim=True))
    assert not any(p.grad is not None for p in parameters.values())


def test_without_trainable_parameters_there_is_a_loss_alone():
    assert loss_and_gradients(lambda: torch.ones(()), {}) == (1, {})
    fixed = nn.Linear(2, 1).requires_grad_(False)
    assert loss_and_gradients(lambda: fixed(torch.zeros(2)).sum() * 0, dict(fixed.named_parameters())) == (0, {})
