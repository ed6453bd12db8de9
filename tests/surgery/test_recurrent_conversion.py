"""convert on recurrent layers and cells."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import normwise
from support.tolerances import assert_close

PLAIN = [
    nn.LSTM(3, 4, num_layers=2, bidirectional=True, batch_first=True),
    nn.LSTM(3, 4, proj_size=2),
    nn.GRU(3, 4, bias=False),
    nn.RNN(3, 4, nonlinearity="relu", num_layers=2, dropout=0.25),
    nn.LSTMCell(3, 4),
    nn.GRUCell(3, 4, bias=False),
    nn.RNNCell(3, 4, nonlinearity="relu"),
]
each_plain = pytest.mark.parametrize("plain", PLAIN, ids=str)


def sample(layer: nn.Module) -> torch.Tensor:
    return torch.randn(*((2,) if isinstance(layer, nn.RNNCellBase) else (5, 2)), 3)


def leaves(result: object) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else [t for part in result for t in leaves(part)]


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@each_plain
def test_namesakes_there_and_back(plain):
    plain.eval()
    here, _ = normwise.convert(plain, to="normwise")
    assert type(here) is getattr(normwise, type(plain).__name__)
    there, _ = normwise.convert(here, to="torch")
    assert type(there) is type(plain)
    assert there.extra_repr() == plain.extra_repr()
    assert there.state_dict().keys() == plain.state_dict().keys()
    x = sample(plain)
    for other in (here, there):
        for actual, expected in zip(leaves(other(x)), leaves(plain(x)), strict=True):
            assert_close(actual, expected, kind="composed", count=10)


@each_plain
@pytest.mark.parametrize("norm", ["layer", "rms", "batch"])
def test_norms_go_in_and_weights_are_carried(plain, norm):
    random_state = torch.get_rng_state()
    new, report = normwise.convert(nn.ModuleList([plain]), recurrent=norm)
    assert torch.equal(torch.get_rng_state(), random_state)
    layer = new[0]
    assert layer.recurrence.norm == norm
    for name, value in plain.named_parameters():
        if name.startswith("weight"):
            assert torch.equal(getattr(layer, name), value)
    gains = {name: value for name, value in layer.named_parameters() if name.startswith("gain")}
    assert gains
    assert all((value == layer.recurrence.gain).all() for value in gains.values())
    assert all(p.requires_grad for p in layer.parameters())
    assert report.changed[0].name == "0"


@pytest.mark.parametrize("variant", ["ba2016", "torchaudio"])
def test_equals_from_torch(variant):
    """`from_torch` is the law for one layer: biases are kept, or summed where the recurrence has one."""
    plain = nn.LSTM(3, 4, num_layers=2)
    new = normwise.convert(plain, recurrent="layer", variant=variant).model
    expected = normwise.LSTM.from_torch(plain, variant=variant)
    for name, value in expected.state_dict().items():
        assert torch.equal(new.state_dict()[name], value), name
    x = sample(plain)
    assert torch.equal(new(x)[0], expected(x)[0])


def test_in_place_the_weights_stay_the_same_objects():
    model = nn.ModuleDict({"rnn": nn.GRU(3, 4)})
    weights = dict(model["rnn"].named_parameters())
    weights["weight_hh_l0"].requires_grad_(False)
    normwise.convert(model, recurrent="layer", inplace=True)
    for name, value in weights.items():
        assert getattr(model["rnn"], name) is value
    y, _ = model["rnn"](torch.randn(5, 2, 3))
    y.backward(torch.randn_like(y))
    assert weights["weight_hh_l0"].grad is None
    assert weights["weight_ih_l0"].grad is not None


def test_what_is_normalized_already_is_skipped():
    model = nn.ModuleList([normwise.LSTM(3, 4, norm="rms"), nn.LSTM(3, 4)])
    _, report = normwise.convert(model, recurrent="layer")
    assert "norm='rms'" in report.skipped[0].reason
    assert [change.name for change in report.changed] == ["1"]


def test_options_are_the_layers_own():
    new = normwise.convert(nn.LSTM(3, 4), recurrent="layer", variant="haste", zoneout=0.1).model
    assert (new.variant, new.recurrence.zoneout) == ("haste", 0.1)
    with pytest.raises(ValueError, match="unknown variant"):
        normwise.convert(nn.LSTM(3, 4), recurrent="layer", variant="hasty")
    with pytest.raises(TypeError, match="biases"):
        normwise.convert(nn.LSTM(3, 4), recurrent="layer", forget_bias=1.0)
