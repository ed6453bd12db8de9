"""Models whose forward differentiates with respect to its inputs: forces, physics-informed nets, gradient penalties."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normwise
from support.tolerances import assert_close


class WithSlope(nn.Module):
    """u(x) and du/dx of a small net."""

    def __init__(self, norm: type[nn.Module] = nn.BatchNorm1d) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 16), norm(16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        u = self.net(x)
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=self.training)
        return torch.cat([u, slope], 1)


class OwnNorm(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


def x() -> Tensor:
    return torch.randn(64, 3)


@pytest.mark.parametrize("exact", [False, True])
def test_recalibrate_sets_the_same_statistics_as_without_the_slope(exact: bool) -> None:
    model, data = WithSlope(), [x() for _ in range(3)]
    model.net[0].bias.requires_grad_(False)
    bare = copy.deepcopy(model.net)
    asked = {name: p.requires_grad for name, p in model.named_parameters()}
    normwise.recalibrate(model, data, exact=exact)
    normwise.recalibrate(bare, data, exact=exact)
    assert torch.equal(model.net[1].running_mean, bare[1].running_mean)
    assert torch.equal(model.net[1].running_var, bare[1].running_var)
    assert not model.net[1].running_mean.requires_grad
    assert {name: p.requires_grad for name, p in model.named_parameters()} == asked


def test_a_forward_that_leaves_no_graph_leaves_none() -> None:
    """A hundred batches do not keep what a hundred backwards would need."""
    model, graphs = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), []
    model[1].register_forward_hook(lambda module, args, result: graphs.append(result.grad_fn))
    normwise.recalibrate(model, [x()])
    assert graphs == [None]


def test_parameters_want_gradients_again_after_an_error() -> None:
    model = WithSlope()
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        normwise.recalibrate(model, [torch.randn(8, 5)])
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("norm", "change"),
    [
        (nn.BatchNorm1d, normwise.fold),
        (nn.BatchNorm1d, lambda model, example: normwise.fuse(model, example=example)),
        (nn.BatchNorm1d, lambda model, example: normwise.convert(model, to="normwise", example=example)),
        (OwnNorm, lambda model, example: normwise.convert(model, to="normwise", example=example)),
    ],
)
def test_what_runs_an_example_computes_the_same_u_and_slope(norm: Any, change: Any) -> None:
    model = WithSlope(norm).eval()
    given = x()
    before = model(given).detach()
    changed, report = change(model, given)
    assert report.changed
    assert_close(changed.eval()(given).detach(), before, kind="composed", count=16)


def test_adapt_and_the_groups_of_convert() -> None:
    assert normwise.adapt(WithSlope(), [x()]).changed
    assert normwise.convert(WithSlope(), to="group", example=x()).report.changed
