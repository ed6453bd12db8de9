"""timm's models: norms with activations, channels first, in any dtype; folded, frozen, recalibrated."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

import normwise
from normwise.surgery import norms
from support.real_models import TIMM as MODELS
from support.real_models import timm_input as example
from support.real_models import timm_model as build
from support.tolerances import assert_close

timm = pytest.importorskip("timm", reason="pip install 'normwise[models]'")
pytestmark = pytest.mark.filterwarnings("ignore")  # the library's own

FOLDED = ["efficientnet_b0", "mobilenetv3_small_100", "regnetx_002", "resnet18"]
each_model = pytest.mark.parametrize("name", MODELS)


@each_model
def test_every_norm_is_seen(name):
    found = norms.norm_layers(build(name))
    assert Counter(type(one.module).__name__ for one in found) == MODELS[name]
    assert all(norms.stands_for(one.module) is not None for one in found)


@each_model
def test_the_model_with_normwises_norms_computes_the_same(name):
    model, x = build(name), example(name)
    new, report = normwise.convert(model, to="normwise", example=x)
    assert len(report.changed) == sum(MODELS[name].values())
    assert not report.skipped
    results = []
    for one in (model, new):
        output = one(x)
        torch.manual_seed(1)
        grads = torch.autograd.grad(output, list(one.parameters()), torch.randn(output.shape))
        results.append([output.detach(), *grads])
    for old, now in zip(*results, strict=True):
        assert_close(now, old, kind="composed", scale=float(old.abs().max()), count=2000)
    back, _ = normwise.convert(new, to="original")
    assert [type(m) for m in back.modules()] == [type(m) for m in model.modules()]
    assert list(back.state_dict()) == list(model.state_dict())
    with torch.no_grad():
        assert torch.equal(back(x), model(x))


@pytest.mark.parametrize("name", FOLDED)
def test_all_batch_norms_fold_into_the_convolutions(name):
    model, x = build(name), example(name)
    folded, report = normwise.fold(model, example=x)
    assert len(report.changed) == sum(MODELS[name].values())
    assert not [m for m in folded.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad():
        expected = model(x)
        assert_close(folded(x), expected, kind="composed", scale=float(expected.abs().max()), count=500)


def test_frozen_and_recalibrated_as_torchs_own():
    model = build("mobilenetv3_small_100")
    batches = [torch.randn(8, 3, 64, 64) for _ in range(3)]
    report = normwise.recalibrate(model, batches)
    assert len(report.changed) == 34
    kept = {key: b.clone() for key, b in model.named_buffers() if "running" in key}
    normwise.freeze(model)
    model.train()(batches[0])
    for key, b in model.named_buffers():
        if "running" in key:
            assert torch.equal(b, kept[key])


def test_other_norms_for_small_batches():
    model, x = build("efficientnet_b0"), example("efficientnet_b0")
    new, report = normwise.convert(model, to="group", example=x)
    assert len(report.changed) == 49
    kinds = {type(m) for m in new.modules()}
    assert normwise.GroupNorm in kinds
    assert not any(issubclass(kind, nn.BatchNorm2d) for kind in kinds)
    assert new(x).shape == (2, 7)


def test_a_net_without_norms_says_so():
    with pytest.raises(ValueError, match="found no normalization layer"):
        normwise.convert(timm.create_model("test_nfnet", num_classes=7), to="normwise")


@pytest.mark.parametrize("name", ["EvoNorm2dB0", "EvoNorm2dS0", "FilterResponseNormTlu2d"])
def test_what_has_no_counterpart_is_refused_by_name(name):
    model = nn.Sequential(getattr(timm.layers, name)(16), nn.BatchNorm2d(16))
    new, report = normwise.convert(model, to="normwise")
    assert type(new[0]).__name__ == name
    assert report.skipped[0].reason.startswith(name[: name.index("2d") - (3 if "Tlu" in name else 0)])


@pytest.mark.parametrize(
    ("name", "fused"),
    [("resnet18", 17), ("efficientnet_b0", 42), ("test_efficientnet_gn", 8), ("test_efficientnet_ln", 8)],
)
def test_norms_and_activations_are_fused(name, fused):
    model, x = build(name), example(name)
    # The proof in float64 is for the small ones.
    new, report = normwise.fuse(model, example=None if name == "efficientnet_b0" else x)
    assert len(report.changed) >= fused
    assert list(new.state_dict()) == list(model.state_dict())
    with torch.no_grad():
        expected = model(x)
        assert_close(new(x), expected, kind="composed", scale=float(expected.abs().max()), count=2000)
    back, _ = normwise.convert(new, to="torch")
    assert [type(m) for m in back.modules()] == [type(m) for m in model.modules()]
    with torch.no_grad():
        assert torch.equal(back(x), expected)


def test_a_convnext_has_nothing_to_fuse():
    with pytest.raises(ValueError, match="fuse found nothing"):
        normwise.fuse(build("convnext_atto"), example=example("convnext_atto"))


def test_the_layer_norms_of_a_vit_become_rms_norms_of_the_same_results():
    model = build("vit_tiny_patch16_224").double()
    x = torch.randn(1, 3, 224, 224, dtype=torch.float64)
    new, report = normwise.convert(model, to="rms", exact=True, example=x)
    assert sum(type(m) is normwise.RMSNorm for m in new.modules()) == 25
    assert not [skip for skip in report.skipped if "does not call it" not in skip.reason]
    with torch.no_grad():
        assert_close(new(x), model(x), kind="composed", count=192)
