"""transformers' models: every norm is seen, exchanged to the bit where it can be, and given back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import normwise
from normwise.surgery import norms
from support.real_models import IMAGE, SIZES
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


def gpt2(*, tied: bool) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
    return _with_means(GPT2LMHeadModel(GPT2Config(**sizes, tie_word_embeddings=tied)))


def of_config(cls: str, config: str, **options: object) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    return _with_means(getattr(transformers, cls)(getattr(transformers, config)(**options)))


def tokens() -> torch.Tensor:
    return torch.randint(1, 99, (2, 9))


def image() -> torch.Tensor:
    return torch.randn(IMAGE, dtype=torch.float64)


@torch.no_grad()
def _with_means(model: nn.Module) -> nn.Module:
    for p in model.parameters():
        p.add_(0.1 + 0.1 * torch.randn_like(p))
    return model.double().eval()


UNTIED = {"vocab_size": 99, "tie_word_embeddings": False, "num_attention_heads": 4, "num_hidden_layers": 2}
PRE_NORM = {
    "GPT-2": (lambda: gpt2(tied=False), tokens, 5),
    "GPT-NeoX": (lambda: of_config("GPTNeoXForCausalLM", "GPTNeoXConfig", **{**SIZES, **UNTIED}), tokens, 5),
    "OPT": (
        lambda: of_config("OPTForCausalLM", "OPTConfig", hidden_size=32, ffn_dim=48, word_embed_proj_dim=32, **UNTIED),
        tokens,
        5,
    ),
    "Phi": (lambda: of_config("PhiForCausalLM", "PhiConfig", **{**SIZES, **UNTIED}), tokens, 3),
    "ViT": (
        lambda: of_config(
            "ViTForImageClassification", "ViTConfig", **SIZES, image_size=64, patch_size=16, num_labels=5
        ),
        image,
        5,
    ),
}


@pytest.mark.parametrize(("model", "x", "count"), PRE_NORM.values(), ids=PRE_NORM)
def test_layer_norms_become_rms_norms_of_the_same_results(model, x, count):
    model = model()
    new, report = normwise.convert(model, to="rms", exact=True, example=x())
    assert not report.skipped
    assert sum(type(m) is normwise.RMSNorm for m in new.modules()) == count
    for _ in range(2):
        inputs = x()
        with torch.no_grad():
            assert_close(new(inputs).logits, model(inputs).logits, kind="composed", count=32)


def test_a_tied_head_is_refused_until_it_is_untied():
    model, x = gpt2(tied=True), torch.randint(99, (2, 9))
    with pytest.raises(ValueError, match=r"transformer.wte.weight, .* is a parameter of another layer too.*untie"):
        normwise.convert(model, to="rms", exact=True, example=x)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    new, report = normwise.convert(model, to="rms", exact=True, example=x)
    assert not report.skipped
    with torch.no_grad():
        assert_close(new(x).logits, model(x).logits, kind="composed", count=32)


def test_a_post_norm_model_is_refused():
    with pytest.raises(ValueError, match="as in a post-norm net"):
        normwise.convert(build("BERT"), to="rms", exact=True, example=example("BERT"))
