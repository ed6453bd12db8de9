"""Which tensors are of norms, and which weight decay they get."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import normwise
from support import foreign_layers, foreign_norms


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.own = normwise.LayerNorm(8)
        self.llama = foreign_norms.LlamaRMSNorm(8)
        self.lstm = normwise.LSTM(8, 8)
        self.conv = nn.Conv1d(8, 8, 3)
        self.batch = nn.BatchNorm1d(8)
        self.again = self.batch
        self.plane = nn.LayerNorm([8, 5])
        self.head = nn.Linear(8, 3)


def test_each_tensor_of_a_norm_once_by_its_name():
    found = normwise.norm_parameters(Model())
    assert {n for n in found.gains if not n.startswith("lstm")} == {
        "own.weight", "llama.weight", "batch.weight", "plane.weight",
    }  # fmt: skip
    of_lstm = {n for n, _ in Model().named_parameters() if "gain_" in n}
    assert of_lstm == {n for n in found.gains if n.startswith("lstm")} != set()
    assert {"own.bias", "batch.bias", "plane.bias"} <= set(found.biases)
    assert set(found.statistics) == {"batch.running_mean", "batch.running_var", "batch.num_batches_tracked"}
    assert not any(n.startswith(("conv", "head", "embed")) for kind in found for n in kind)


def test_the_tensors_are_the_models_own():
    model = Model()
    found, own = normwise.norm_parameters(model), dict(model.named_parameters())
    assert all(tensor is own[name] for kind in found[:2] for name, tensor in kind.items())


def test_names_of_other_peoples_layers():
    found = normwise.norm_parameters(nn.Sequential(nn.Conv2d(3, 8, 3), foreign_layers.BatchNormAct(8)))
    assert set(found.gains) == {"1.gamma"}
    assert set(found.biases) == {"1.beta"}
    assert len(found.statistics) >= 2


@pytest.mark.parametrize("shape", [(8,), (8, 1, 1), (1, 8, 1, 1)])
def test_a_gain_of_any_shape_is_the_models_own(shape):
    class ChannelRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gamma = nn.Parameter(torch.ones(shape))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-6)
            return y * self.gamma.view(-1, 1, 1)

    model = nn.Sequential(nn.Conv2d(3, 8, 3), ChannelRMSNorm())
    assert normwise.norm_parameters(model).gains == {"1.gamma": model[1].gamma}
    decayed, rest = normwise.decay_groups(model, 0.1)
    assert [id(p) for p in decayed["params"]] == [id(model[0].weight)]
    assert {id(p) for p in rest["params"]} == {id(model[0].bias), id(model[1].gamma)}


def test_statistics_of_all_that_was_seen():
    assert set(normwise.norm_parameters(normwise.RunningNorm(3, affine=True)).statistics) == {"mean", "var", "count"}


def test_weight_decay_spares_norms_of_any_shape_and_all_vectors():
    model = Model()
    decayed, rest = normwise.decay_groups(model, 0.1)
    names = {id(p): n for n, p in model.named_parameters()}
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    assert {names[id(p)] for p in decayed["params"]} == {
        "embed.weight", "conv.weight", "head.weight", "lstm.weight_ih_l0", "lstm.weight_hh_l0",
    }  # fmt: skip
    assert len(decayed["params"]) + len(rest["params"]) == len(names)
    torch.optim.AdamW(normwise.decay_groups(model, 0.1), lr=1e-3)


def test_what_is_not_trained_is_in_no_group():
    model = Model().requires_grad_(False)
    model.own.requires_grad_(True)
    (group,) = normwise.decay_groups(model, 0.1)
    assert group == {"params": [model.own.weight, model.own.bias], "weight_decay": 0.0}
    with pytest.raises(ValueError, match="no parameter to train"):
        normwise.decay_groups(model.requires_grad_(False), 0.1)


def test_the_finding_about_weight_decay_is_gone():
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3))
    data = [(torch.randn(16, 6), torch.randint(3, (16,))) for _ in range(3)]
    for parameters, expected in ((model.parameters(), True), (normwise.decay_groups(model, 0.1), False)):
        optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1)
        found = normwise.diagnose(model, data, loss=nn.functional.cross_entropy, optimizer=optimizer)
        assert any(f.code == "NW011" for f in found.findings) is expected


@pytest.mark.parametrize("verb", [normwise.norm_parameters, lambda m: normwise.decay_groups(m, 0.1)])
def test_what_is_no_model_is_refused(verb):
    with pytest.raises(TypeError, match=r"expects a torch\.nn\.Module"):
        verb([nn.Linear(2, 2)])


def test_negative_decay_is_refused():
    with pytest.raises(ValueError, match="0 or positive"):
        normwise.decay_groups(nn.Linear(2, 2), -0.1)
    with pytest.raises(
        TypeError, match=r"weight_decay must be 0 or .*, but got str \('0\.01'\): write weight_decay=0\.01"
    ):
        normwise.decay_groups(nn.Linear(2, 2), "0.01")
