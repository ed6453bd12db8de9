from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

from normwise import BatchRenorm1d
from normwise.lab.run import run
from normwise.lab.shift import Shift
from normwise.lab.spec import Spec
from normwise.lab.tasks import load_task
from normwise.lab.tasks.mlp import Mlp


def one_update(norm="batch", rate=0.1):
    """A net of the task mlp, before its first update, with the batch's gradients."""
    task = load_task("mlp").task
    model = task.model(norm, 0).train()
    batch = next(task.batches(32, 1, 0))
    task.loss(task.forward(model, batch), batch).backward()
    return task, model, batch, torch.optim.SGD(model.parameters(), lr=rate)


def test_the_gradient_s_change_is_that_of_a_net_of_which_the_first_layers_alone_are_updated():
    task, model, batch, optimizer = one_update()
    old = {name: value.clone() for name, value in model.state_dict().items()}
    gradient = model.linear3.weight.grad.clone()
    shift = Shift(model, task, batch)
    optimizer.step()
    new = {name: value.clone() for name, value in model.state_dict().items()}
    found = shift.after_update()

    twin = task.model("batch", 0).train()
    first = ("linear1", "norm1", "linear2", "norm2")
    twin.load_state_dict({name: (new if name.startswith(first) else old)[name] for name in old})
    task.loss(task.forward(twin, batch), batch).backward()
    moved = twin.linear3.weight.grad
    assert found["shift/gradient/linear3.weight"] == pytest.approx(
        float((moved - gradient).norm() / gradient.norm()), rel=1e-4
    )
    cosine = nn.functional.cosine_similarity(moved.flatten(), gradient.flatten(), dim=0)
    assert found["shift/cosine/linear3.weight"] == pytest.approx(float(cosine), rel=1e-4)


def test_looking_changes_nothing():
    task, model, batch, optimizer = one_update()
    shift = Shift(model, task, batch)
    optimizer.step()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    state = torch.get_rng_state()
    shift.after_update()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_an_update_of_nothing_shifts_nothing():
    task, model, batch, optimizer = one_update(rate=0.0)
    shift = Shift(model, task, batch)
    optimizer.step()
    found = shift.after_update()
    assert {name: value for name, value in found.items() if "cosine" not in name} == {
        f"shift/{what}/linear{layer}.weight": 0.0 for what in ("gradient", "inputs") for layer in (2, 3, 4)
    }


@pytest.mark.parametrize("task", ["cnn", "rnn", "transformer"])
def test_every_task_records_it(task):
    result = run(Spec(task, "layer", 8, 0.01, 0, 2))
    names = {name.split("/")[1] for name in result.series if name.startswith("shift/")}
    assert names == {"gradient", "cosine", "inputs"}
    assert all(math.isfinite(v) for name, s in result.series.items() if name.startswith("shift/") for v in s.values)


@dataclass(frozen=True)
class OutOfOrder(Mlp):
    """Layers registered in another order than they are called in; dropout and averages that are read in training."""

    name: ClassVar[str] = "out-of-order"

    def model(self, norm, seed):
        names = ("linear2", "linear4", "linear1", "linear3")
        sizes = {"linear1": (784, 20), "linear2": (20, 20), "linear3": (20, 20), "linear4": (20, 10)}
        norms = {f"norm{k}": BatchRenorm1d(20, r_max=9.0, d_max=9.0) for k in (3, 1, 2)}
        layers = nn.ModuleDict({name: nn.Linear(*sizes[name]) for name in names} | norms)
        layers["dropout"] = nn.Dropout(0.3)
        return layers

    def forward(self, model, batch):
        x = batch.inputs.flatten(1)[:, :784]
        for k in (1, 2, 3):
            x = model["dropout"](model[f"norm{k}"](model[f"linear{k}"](x)).sigmoid())
        return model["linear4"](x)


def out_of_order(rate):
    task = OutOfOrder()
    model = task.model("batch", 0).train()
    batch = next(task.batches(32, 1, 0))
    task.loss(task.forward(model, batch), batch).backward()
    return task, model, batch, torch.optim.SGD(model.parameters(), lr=rate)


def test_layers_are_in_the_order_of_their_calls():
    """The first that is called has nothing before it, wherever it was registered."""
    task, model, batch, optimizer = out_of_order(rate=1.0)
    shift = Shift(model, task, batch)
    optimizer.step()
    found = shift.after_update()
    assert list(found) == [
        *(f"shift/inputs/linear{k}.weight" for k in (2, 3, 4)),
        *(f"shift/{what}/linear{k}.weight" for k in (2, 3, 4) for what in ("gradient", "cosine")),
    ]
    assert all(value > 0 for name, value in found.items() if "cosine" not in name)


def test_an_update_of_nothing_shifts_nothing_where_passes_draw_and_read_running_averages():
    task, model, batch, optimizer = out_of_order(rate=0.0)
    shift = Shift(model, task, batch)
    optimizer.step()
    assert [value for name, value in shift.after_update().items() if "cosine" not in name] == [0] * 6


@dataclass(frozen=True)
class OneLayer(Mlp):
    """Nothing acts on the inputs of its only layer."""

    name: ClassVar[str] = "one-layer"

    def model(self, norm, seed):
        return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))


def test_a_net_of_one_layer_has_no_layer_to_follow():
    task = OneLayer()
    model = task.model("none", 0).train()
    shift = Shift(model, task, next(task.batches(8, 1, 0)))
    assert shift.after_update() == {}
