"""freeze: statistics that stay, whatever the model is told."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import normwise
from support.surgery_models import IMAGES, assert_same_state, net, state
from support.tolerances import assert_close

NORMS = ["stem.1", "shared", "blocks.0.norm", "blocks.1.norm", "head.1"]


def statistics(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.named_buffers()}


@pytest.mark.parametrize("make", [net, lambda: normwise.convert(net(), to="batch").model], ids=["torch", "normwise"])
def test_statistics_stay_through_train(make):
    """What putting the layers into eval mode does not do: torch's train() wakes them."""
    model = make()
    report = normwise.freeze(model)
    assert {name for change in report.changed for name in change.name.split(", ")} == set(NORMS)
    assert sorted(normwise.frozen(model)) == sorted(NORMS)
    before = statistics(model)
    model.train()
    assert model.training
    x = torch.randn(IMAGES)
    y = model(x)
    after = statistics(model)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert_close(y, copy.deepcopy(model).eval()(x))
    y.backward(torch.randn_like(y))
    assert model.stem[0].weight.grad is not None
    assert model.stem[1].weight.grad is None


def test_gain_and_bias_can_learn_on():
    model = net()
    normwise.freeze(model, affine=False)
    y = model.train()(torch.randn(IMAGES))
    y.backward(torch.randn_like(y))
    assert model.stem[1].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies_are_frozen_on_their_own(copied):
    model = net()
    normwise.freeze(model)
    twin = copied(model)
    normwise.unfreeze(model)
    assert normwise.frozen(model) == []
    twin.train()
    assert sorted(normwise.frozen(twin)) == sorted(NORMS)
    assert not twin.stem[1].training
    assert model.stem[1].training


def test_unfreeze_undoes_it():
    model = net()
    model.stem[1].bias.requires_grad_(False)
    before = state(model)
    learned = {name: p.requires_grad for name, p in model.named_parameters()}
    normwise.freeze(model)
    normwise.freeze(model, affine=False)
    normwise.freeze(model)
    normwise.unfreeze(model)
    assert_same_state(model, before)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == learned


def test_where_and_what_is_left_out():
    model = nn.Sequential(net(), nn.BatchNorm1d(2, track_running_stats=False), nn.InstanceNorm1d(2))
    report = normwise.freeze(model, where="0.blocks.*")
    assert normwise.frozen(model) == ["0.blocks.0.norm", "0.blocks.1.norm"]
    assert all("where" in skip.reason for skip in report.skipped)
    report = normwise.freeze(model)
    assert [(skip.name, skip.reason[:20]) for skip in report.skipped] == [
        ("1", "track_running_stats="),
        ("2", "it has no running st"),
    ]
    normwise.unfreeze(model, where="0.stem*")
    assert "0.stem.1" not in normwise.frozen(model)
    assert "0.head.1" in normwise.frozen(model)


def test_recurrent_batch_norm():
    model = normwise.LSTM(3, 4, norm="batch", num_stat_steps=5)
    normwise.freeze(model)
    before = statistics(model)
    model.train()(torch.randn(5, 2, 3))
    assert all(torch.equal(value, before[name]) for name, value in statistics(model).items())
    assert model.weight_ih_l0.requires_grad
    assert not model.gain_ih_l0.requires_grad
    dropping = nn.ModuleList([normwise.LSTM(3, 4, 2, norm="batch", dropout=0.5), nn.BatchNorm1d(2)])
    assert "dropout" in normwise.freeze(dropping).skipped[0].reason


def test_a_converted_layer_stays_frozen_if_it_can():
    model = nn.Sequential(nn.BatchNorm1d(4))
    normwise.freeze(model)
    same, _ = normwise.convert(model, to="batch")
    assert not same.train()[0].training
    other, report = normwise.convert(model, to="group")
    assert "no longer frozen" in report.changed[0].note
    assert other.train()[0].training


def test_a_layer_behind_which_an_activation_comes_stays_frozen():
    model = nn.Sequential(normwise.BatchNorm1d(4, act="relu"))
    normwise.freeze(model)
    new = normwise.convert(model, to="torch").model.train()
    assert normwise.frozen(new) == ["0.0"]
    assert not new[0][0].training


def test_a_train_that_is_bound_to_the_instance_is_not_replaced():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4))
    said = []
    model[0].train = said.append
    report = normwise.freeze(model)
    assert [skip.name for skip in report.skipped] == ["0"]
    assert "bound to this very instance" in report.skipped[0].reason
    model.train()
    assert said == [True]


def test_nothing_to_freeze_is_an_error():
    with pytest.raises(ValueError, match=r"requires_grad_\(False\)"):
        normwise.freeze(nn.Sequential(nn.LayerNorm(3)))
    with pytest.raises(ValueError, match="track_running_stats=False"):
        normwise.freeze(nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False)))
    with pytest.raises(ValueError, match="no frozen layer"):
        normwise.unfreeze(net())


def test_a_compiled_model_sees_a_constant():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    normwise.freeze(model)
    model.train()
    before = statistics(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x = torch.randn(5, 3)
    assert_close(compiled(x), model(x))
    assert all(torch.equal(value, before[name]) for name, value in statistics(model).items())
