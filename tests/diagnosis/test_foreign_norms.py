"""Diagnosis takes norm layers of any class for what they compute."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import normwise
from support import foreign_layers as layers
from support import foreign_norms as written


def diagnosed(model: nn.Module, *shape: int, batches: int = 4, **options: object) -> normwise.Diagnosis:
    data = [(torch.randn(shape), torch.randint(0, 3, shape[:1])) for _ in range(batches)]
    return normwise.diagnose(model, data, loss=nn.functional.cross_entropy, **options)


class Block(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.body = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(self.norm(x))


class Net(nn.Module):
    """A deep net of residual blocks, of tokens (N, L, 16)."""

    def __init__(self, make: type[nn.Module], depth: int = 6) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(make(16)) for _ in range(depth)))
        self.last, self.head = make(16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.blocks(x)).mean(1))


KINDS = {
    written.LlamaRMSNorm: "rms",
    written.GemmaRMSNorm: "rms",
    written.T5LayerNorm: "rms",
    written.LayerNorm1P: "layer",
    layers.CenteredNorm: "layer",
    layers.NormalizedRMSNorm: "rms",
}


@pytest.mark.parametrize("cls", KINDS, ids=lambda cls: cls.__name__)
def test_norms_of_other_classes_are_norms_with_all_their_numbers(cls):
    found = diagnosed(Net(cls), 8, 5, 16)
    norms = [layer for layer in found.layers if layer.role == "norm"]
    assert len(norms) == 7
    for layer in norms:
        assert layer.kind == cls.__name__
        assert layer.norm.kind == KINDS[cls]
        assert layer.norm.gain.mean == pytest.approx(1.0)  # of a weight around 0 too
        assert layer.norm.gain_gradient > 0
        assert not layer.may_be_norm
    assert not [f for f in found.findings if f.code == "NW014"]
    assert not any("unknown" in note or "does not know" in note for note in found.notes)


def test_the_findings_are_those_of_the_same_model_with_normwises_norms():
    torch.manual_seed(0)
    model = Net(written.LlamaRMSNorm)
    with torch.no_grad():
        model.blocks[2].norm.weight[3] = 0.0  # a dead gain
    ours = normwise.convert(model, to="normwise", example=torch.randn(2, 5, 16)).model
    found = []
    for one in (model, ours):
        torch.manual_seed(1)
        found.append([(f.code, f.layer) for f in diagnosed(one, 8, 5, 16).findings])
    assert found[0] == found[1]
    assert any(layer == "blocks.2.norm" for _, layer in found[0])


class Conv(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.Conv2d(8, 8, 3))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


def test_running_statistics_that_lag_behind_are_found_under_any_name():
    model = Conv(layers.BatchNormAct(8))
    torch.manual_seed(0)
    with torch.no_grad():
        model.body[1].moving_mean.fill_(30.0)
    found = diagnosed(model, 16, 3, 8, 8)
    (layer,) = [layer for layer in found.layers if layer.role == "norm"]
    assert layer.kind == "BatchNormAct"
    assert layer.norm.kind == "batch"
    assert layer.norm.running.distance.mean > 3
    twin = Conv(nn.Sequential(nn.BatchNorm2d(8), nn.Dropout(0.25), nn.SiLU()))
    with torch.no_grad():
        twin.body[1][0].running_mean.fill_(30.0)
    expected = {f.code for f in diagnosed(twin, 16, 3, 8, 8).findings if f.layer == "body.1.0"}
    assert {f.code for f in found.findings if f.layer == "body.1"} == expected
    assert expected


def test_channels_first_norms_have_their_features_on_axis_one():
    found = diagnosed(Conv(layers.LayerNorm2d(8)), 4, 3, 8, 8)
    (layer,) = [layer for layer in found.layers if layer.role == "norm"]
    assert layer.norm.kind == "layer"
    assert layer.norm.eps == 1e-5


def test_gains_of_any_name_are_gains_to_weight_decay():
    model = Conv(layers.BatchNormAct(8))
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    found = diagnosed(model, 16, 3, 8, 8, optimizer=optimizer)
    (group,) = found.optimizer
    assert (group.gains, group.biases) == (1, 1)
    assert group.examples == ["body.1.gamma", "body.1.beta"]


def test_what_only_has_the_name_of_a_norm_is_named_and_judged_by_nobody():
    model = nn.Sequential(nn.Linear(16, 16), layers.MaxNorm(16), nn.Linear(16, 3))
    found = diagnosed(model, 8, 16)
    assert [layer.name for layer in found.layers if layer.may_be_norm] == ["1"]
    assert not [layer for layer in found.layers if layer.role == "norm"]


def test_the_model_is_afterwards_as_it_was():
    model = Net(written.GemmaRMSNorm)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    kinds = [type(m) for m in model.modules()]
    diagnosed(model, 8, 5, 16)
    assert [type(m) for m in model.modules()] == kinds
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Scaled(Block):
    """Its branch starts next to nothing, as LayerScale's does."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__(norm)
        self.scale = layers.LayerScale(16)
        with torch.no_grad():
            self.scale.gamma.fill_(1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale(self.body(self.norm(x)))


def test_a_branch_that_starts_small_is_no_end_of_an_exploding_gradient():
    model = Net(written.LlamaRMSNorm)
    model.blocks = nn.Sequential(
        nn.Linear(16, 16),
        *(Scaled(written.LlamaRMSNorm(16)) for _ in range(4)),
        nn.Linear(16, 16),
        *(Scaled(written.LlamaRMSNorm(16)) for _ in range(1)),
    )
    assert not [f.code for f in diagnosed(model, 8, 5, 16).findings]
