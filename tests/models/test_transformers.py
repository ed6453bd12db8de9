"""transformers' models: every norm is seen, exchanged to the bit where it can be, and given back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import normwise
from normwise.surgery import norms
from support.real_models import TRANSFORMERS as MODELS
from support.real_models import last_hidden_state as output_of
from support.real_models import transformer as build
from support.real_models import transformer_input as example
from support.tolerances import assert_close

pytest.importorskip("transformers", reason="pip install 'normwise[models]'")
pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' own

# Where half precision comes out to the last bit: the norms that are written out in torch's operations.
TO_THE_BIT = ["Llama", "Gemma", "Gemma 2", "T5", "Qwen3", "Olmo 2"]
each_model = pytest.mark.parametrize("name", MODELS)


@each_model
def test_every_norm_is_seen(name):
    model = build(name)
    found = norms.norm_layers(model)
    assert len(found) == MODELS[name].norms, [f"{one.name}: {one.kind}" for one in found]
    assert sum(norms.stands_for(one.module) is None for one in found) == MODELS[name].refused


@each_model
def test_the_model_with_normwises_norms_computes_the_same(name):
    model, x = build(name), example(name)
    new, report = normwise.convert(model, to="normwise", example=x)
    assert len(report.changed) == MODELS[name].norms - MODELS[name].refused
    assert len(report.skipped) == MODELS[name].refused
    results = []
    for one in (model, new):
        output = output_of(one, x)
        torch.manual_seed(1)
        upstream = torch.randn(output.shape)
        learned = [p for p in one.parameters() if p.requires_grad]
        grads = torch.autograd.grad(output, learned, upstream, allow_unused=True)
        results.append([output.detach(), *(g for g in grads if g is not None)])
    largest = max(float(old.abs().max()) for old in results[0][1:])
    for old, now in zip(*results, strict=True):
        # Several layers deep, in float32: each step rounds, and each gradient subtracts. What is left of one that is
        # zero by construction (of a bias in front of a norm) is the rounding of the others.
        assert_close(now, old, kind="composed", scale=max(float(old.abs().max()), 1e-4 * largest), count=400)


@pytest.mark.parametrize("name", TO_THE_BIT)
def test_in_bfloat16_the_model_gives_the_same_bits(name):
    model = build(name).to(torch.bfloat16)
    new, report = normwise.convert(model, to="normwise", example=example(name))
    assert all("to the last bit" in change.note for change in report.changed)
    for _ in range(10):
        x = example(name)
        with torch.no_grad():
            assert torch.equal(output_of(new, x), output_of(model, x))


@each_model
def test_the_way_back_gives_the_very_model(name):
    model, x = build(name), example(name)
    new, _ = normwise.convert(model, to="normwise", example=x)
    back, _ = normwise.convert(new, to="original")
    assert [type(m) for m in back.modules()] == [type(m) for m in model.modules()]
    assert list(back.state_dict()) == list(model.state_dict())
    with torch.no_grad():
        assert torch.equal(output_of(back, x), output_of(model, x))


def test_a_catalogued_model_needs_no_example():
    model = build("Llama")
    new, report = normwise.convert(model, to="normwise")
    assert len(report.changed) == 5
    assert all("proved on generated inputs" in change.note for change in report.changed)
    x = example("Llama")
    with torch.no_grad():
        assert_close(output_of(new, x), output_of(model, x), kind="composed", scale=4.0, count=100)


def test_a_detr_backbone_has_frozen_statistics():
    from transformers.models.detr.modeling_detr import DetrFrozenBatchNorm2d

    model = nn.Sequential(nn.Conv2d(3, 8, 1), DetrFrozenBatchNorm2d(8), nn.ReLU()).eval()
    with torch.no_grad():
        for b in model[1].buffers():
            b.uniform_(0.5, 2)
    x = torch.randn(2, 3, 5, 5)
    new, _ = normwise.convert(model, to="normwise")
    assert type(new[1]) is normwise.FrozenBatchNorm2d
    assert_close(new(x), model(x), kind="composed", scale=10.0)
    folded, report = normwise.fold(model)
    assert report.changed[0].before == "DetrFrozenBatchNorm2d"
    assert_close(folded(x), model(x), kind="composed", scale=10.0)


def test_a_model_trains_on_after_the_exchange():
    model = build("Qwen3").train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    normwise.convert(model, to="normwise", example=example("Qwen3"), inplace=True)
    gain = model.norm.weight
    before = gain.detach().clone()
    output_of(model, example("Qwen3")).square().mean().backward()
    optimizer.step()
    assert not torch.equal(gain, before)
    assert model.norm.weight is gain
