from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor, nn

import normwise
from normwise.measure import shift
from normwise.measure.gradients import loss_and_gradients


def test_moved_by_half_a_deviation_whatever_the_order_of_the_values():
    values = torch.randn(3, 300) * torch.tensor([[1.0], [5.0], [0.1]])
    std = values.std(dim=1, correction=0, keepdim=True)
    assert shift.input_shift(values, (values + 0.5 * std)[:, torch.randperm(300)]) == pytest.approx(0.5, rel=1e-4)


def test_a_stretched_distribution():
    # E|X| of a standard normal is sqrt(2 / pi): stretched by 1.5, every quantile moves by half of itself.
    values = torch.randn(3, 4000)
    assert shift.input_shift(values, 1.5 * values) == pytest.approx(0.5 * math.sqrt(2 / math.pi), rel=0.05)


def test_constant_features_have_no_scale():
    values = torch.randn(1, 300)
    both = torch.cat([values, torch.ones(1, 300)])
    assert shift.input_shift(torch.ones(2, 5), torch.zeros(2, 5)) == 0
    assert shift.input_shift(both, 2 * both) == pytest.approx(shift.input_shift(values, 2 * values))


def test_a_gradient_that_is_turned_and_stretched():
    before, after = torch.tensor([3.0, 4.0]), torch.tensor([-8.0, 6.0])  # at a right angle, twice as long
    size, cosine = shift.gradient_change(before, after)
    assert size == pytest.approx(math.sqrt(5))
    assert cosine == pytest.approx(0, abs=1e-6)
    assert shift.gradient_change(torch.zeros(2), after) is None


@pytest.mark.parametrize(
    ("count", "most", "chosen"),
    [(1, 3, []), (0, 3, []), (3, 3, [1, 2]), (4, 3, [1, 2, 3]), (7, 3, [2, 4, 6]), (5, 2, [2, 4])],
)
def test_layers_evenly_spread_without_the_first(count, most, chosen):
    assert shift.evenly_spread(range(count), most) == chosen


class Noisy(nn.Module):
    """Reads, draws from or writes to all that a replay must put back, and may be told to stop changing."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(6, 3)  # registered before what it is called after
        self.first = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 6))
        self.norm = normwise.BatchRenorm1d(6, r_max=9.0, d_max=9.0)
        self.dropout = nn.Dropout(0.4)
        self.calls = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = self.norm(self.first(x)) * (1 + random.random() + self.calls)
        return self.last(self.dropout(y))


def replay_of(model, x):
    return shift.Replay(model, lambda: model(x).square().mean())


def test_a_replay_gives_the_same_loss_and_gradients_again_and_leaves_no_trace():
    model, x = Noisy().train(), torch.randn(16, 4)
    replay = replay_of(model, x)
    parameters = dict(model.named_parameters())
    real, gradients = loss_and_gradients(replay.loss, parameters)  # which moves averages, counts and draws
    calls, mean, state = float(model.calls), model.norm.running_mean.clone(), torch.get_rng_state()
    for _ in range(2):
        again, found = replay.gradients(parameters)
        assert again == real
        assert all(torch.equal(found[name], gradient) for name, gradient in gradients.items())
    replay.forward()
    assert float(model.calls) == calls
    assert torch.equal(model.norm.running_mean, mean)
    assert torch.equal(torch.get_rng_state(), state)


def test_parameters_in_the_order_of_calls():
    model = Noisy()
    assert shift.parameters_in_order(replay_of(model, torch.randn(16, 4))) == [
        "first.bias",
        "first.parametrizations.weight.original",
        "norm.weight",
        "norm.bias",
        "last.weight",
        "last.bias",
    ]


def test_what_a_module_uses_without_calling_it_goes_with_the_module():
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
    names = shift.parameters_in_order(replay_of(model, torch.randn(3, 5, 8)))
    owners = [name.rpartition(".")[0] for name in names]
    assert list(dict.fromkeys(owners)) == ["norm1", "self_attn", "self_attn.out_proj", "norm2", "linear1", "linear2"]


def rows(name, args, kwargs):
    return args[0].T


def step_shift(model, x, weights, order=None):
    replay = replay_of(model, x)
    order = [[name] for name in shift.parameters_in_order(replay)] if order is None else order
    parameters = dict(model.named_parameters())
    gradients = replay.gradients(parameters)[1]
    modules = {"norm": model.norm, "last": model.last}
    return shift.StepShift(replay, order, gradients, weights, modules, rows), parameters, gradients


def test_no_step_is_no_shift_whatever_the_model_draws_and_averages():
    found, _, _ = step_shift(Noisy().train(), torch.randn(16, 4), {"last": ["last.weight"]})
    assert found.of_inputs() == {"norm": 0, "last": 0}
    assert found.of_gradients()["last"][0] == 0


def test_only_the_layers_before_take_their_step():
    """Parameters outside the order count as behind all layers; the step itself stays."""
    model, x = Noisy().train().double(), torch.randn(16, 4, dtype=torch.float64)
    order = [["first.bias", "first.parametrizations.weight.original"], ["last.weight", "last.bias"]]
    found, parameters, gradients = step_shift(model, x, {"last": ["last.weight", "last.bias"]}, order)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    with torch.no_grad():
        for name, p in parameters.items():
            p -= 0.5 * gradients[name]
    after = {name: p.detach().clone() for name, p in parameters.items()}
    change = found.of_gradients()["last"]
    assert all(torch.equal(p, after[name]) for name, p in parameters.items())
    with torch.no_grad():
        for name, p in parameters.items():
            if not name.startswith("first"):
                p.copy_(before[name])
    now = found.replay.gradients(parameters)[1]
    old, new = (torch.cat([g["last.weight"].flatten(), g["last.bias"]]) for g in (gradients, now))
    assert change == pytest.approx(shift.gradient_change(old, new), rel=1e-9)
    assert change[0] > 0


def test_a_layer_that_the_pass_no_longer_reaches_has_no_change():
    """A way through the model that depends on the weights."""

    class Turns(Noisy):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if float(self.first.bias.detach()[0]) < 5 else self.first(x)

    model = Turns().train()
    found, parameters, _ = step_shift(model, torch.randn(16, 4), {"last": ["last.weight"]})
    with torch.no_grad():
        parameters["first.bias"] += 10
    assert found.of_gradients() == {}
    assert found.of_inputs().keys() == set()
