"""With an optimizer: the steps are those that training would take, and internal covariate shift is as defined."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import normwise
from normwise.diagnosis import diagnose

cross_entropy = nn.functional.cross_entropy


def net(dropout: float = 0.0) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 3)
    )


def batches(count: int = 3) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(24, 6), torch.randint(3, (24,))) for _ in range(count)]


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9),
        lambda p: torch.optim.AdamW(p, lr=0.01),
        lambda p: torch.optim.LBFGS(p, max_iter=3),
    ],
)
def test_losses_are_those_of_training(make):
    model, data = net(), batches()
    found = diagnose(model, data, loss=cross_entropy, optimizer=make(model.parameters()))
    twin = copy.deepcopy(model).train()
    optimizer = make(twin.parameters())
    losses = []

    def closure(x: Tensor, target: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(twin(x), target)
        loss.backward()
        return loss

    for x, target in data:
        losses.append(float(cross_entropy(twin(x), target).detach()))
        optimizer.step(lambda x=x, target=target: closure(x, target))
    assert found.training.losses == pytest.approx(losses, rel=1e-5)


def test_gradient_change_is_santurkars():
    """Against the definition written out: only the layers before take their step."""
    model, data = net().double(), [(x.double(), target) for x, target in batches(1)]
    found = diagnose(model, data, loss=cross_entropy, optimizer=torch.optim.SGD(model.parameters(), lr=0.5))
    twin = copy.deepcopy(model).train()
    (x, target) = data[0]

    def gradient() -> Tensor:
        return torch.autograd.grad(cross_entropy(twin(x), target), twin[4].weight)[0].flatten()

    before = gradient()
    steps = torch.autograd.grad(cross_entropy(twin(x), target), list(twin.parameters()))
    with torch.no_grad():
        for parameter, step in list(zip(twin.parameters(), steps, strict=True))[:4]:  # linear and norm before twin[4]
            parameter -= 0.5 * step
    after = gradient()
    shift = found.layer("4").shift
    assert shift.gradient == pytest.approx([float((after - before).norm() / before.norm())], rel=1e-9)
    assert shift.cosine == pytest.approx([float(nn.functional.cosine_similarity(before, after, dim=0))], rel=1e-9)
    assert found.layer("0").shift.gradient == []
    assert found.layer("0").shift.inputs == [0.0]
    assert found.layer("6").shift.inputs[0] > 0


def test_a_learning_rate_of_zero_shifts_nothing():
    """Also with dropout: every pass draws the same random numbers."""
    model = net(0.5)
    found = diagnose(model, batches(2), loss=cross_entropy, optimizer=torch.optim.SGD(model.parameters(), lr=0.0))
    for name in ("4", "6"):
        shift = found.layer(name).shift
        assert shift.inputs == [0.0, 0.0]
        assert shift.gradient == [0.0, 0.0]
        assert shift.cosine == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize(
    "layer",
    [
        lambda: normwise.BatchRenorm1d(8, r_max=9.0, d_max=9.0),
        lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)),
    ],
    ids=["averages that are read in training", "a power iteration"],
)
def test_a_learning_rate_of_zero_shifts_nothing_where_a_pass_moves_what_the_next_one_reads(layer):
    model = net(0.5)
    model[1] = layer()
    found = diagnose(model, batches(2), loss=cross_entropy, optimizer=torch.optim.SGD(model.parameters(), lr=0.0))
    for name in ("4", "6"):
        assert found.layer(name).shift.inputs == found.layer(name).shift.gradient == [0.0, 0.0]


def test_without_an_optimizer_there_are_no_steps():
    found = diagnose(net(), batches(1), loss=cross_entropy)
    assert (found.training, found.optimizer) == (None, [])
    assert all(layer.shift is None for layer in found.layers)
