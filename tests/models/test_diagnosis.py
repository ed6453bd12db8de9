"""diagnose on transformers' and timm's models: every norm is one, and what is healthy raises nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import normwise
from support.real_models import TIMM, TRANSFORMERS, timm_input, timm_model, transformer, transformer_input

pytest.importorskip("transformers", reason="pip install 'normwise[models]'")
pytest.importorskip("timm", reason="pip install 'normwise[models]'")
pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' own


def of_hidden_state(output: object, target: Tensor) -> Tensor:
    """Of all tokens or positions, as a head would be."""
    hidden = output.last_hidden_state
    features = hidden.mean((2, 3)) if hidden.dim() == 4 else hidden.mean(1)
    return F.cross_entropy(features[:, :3], target)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_fresh_transformer_is_healthy_and_all_its_norms_are_seen(name):
    batches = [torch.cat([transformer_input(name) for _ in range(4)]) for _ in range(3)]
    data = [(x, torch.randint(0, 3, (len(x),))) for x in batches]
    found = normwise.diagnose(transformer(name, fresh=True), data, loss=of_hidden_state)
    expected = TRANSFORMERS[name].norms - TRANSFORMERS[name].refused
    assert sum(layer.role == "norm" for layer in found.layers) == expected
    assert not [(f.code, f.layer, f.cause) for f in found.findings]


@pytest.mark.parametrize("name", [name for name in TIMM if "vit" not in name])  # which takes a minute
def test_a_fresh_net_of_timm_is_healthy_and_all_its_norms_are_seen(name):
    data = [(torch.cat([timm_input(name)] * 2), torch.randint(0, 7, (4,))) for _ in range(2)]
    found = normwise.diagnose(timm_model(name, fresh=True), data, loss=F.cross_entropy)
    assert sum(layer.role == "norm" for layer in found.layers) == sum(TIMM[name].values())
    assert not [(f.code, f.layer, f.cause) for f in found.findings]


def test_a_dead_gain_of_a_llama_is_found_by_its_name():
    model = transformer("Llama", fresh=True)
    with torch.no_grad():
        model.layers[1].input_layernorm.weight[5] = 0.0
    data = [(transformer_input("Llama"), torch.randint(0, 3, (2,))) for _ in range(3)]
    found = normwise.diagnose(model, data, loss=of_hidden_state)
    assert [(f.code, f.layer) for f in found.findings] == [("NW008", "layers.1.input_layernorm")]
