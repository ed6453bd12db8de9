"""What all layers have in common: torch's own tools keep their activation, and torch.jit.script is refused."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings

import pytest
import torch
from torch import Tensor, nn

import normwise
from normwise.nn.construct import eps_of
from support.layer_samples import NORMS, Sample, each_layer, same, trained_once

REFUSED = r"with act='\w+' hides its eps from code that may leave the activation out.*normwise.convert, fold or freeze"
ACTIVATED = pytest.mark.parametrize("sample", [s for s in NORMS if "act" in s.kwargs], ids=str)
PLAIN = pytest.mark.parametrize("sample", [s for s in NORMS if "act" not in s.kwargs], ids=str)


def frozen(norm: nn.Module) -> nn.Module:
    """As timm, torchvision and detectron2 freeze what they take for a BatchNorm."""
    fixed = normwise.FrozenBatchNorm2d(norm.num_features, eps=norm.eps)
    fixed.load_state_dict(norm.state_dict())
    return fixed


def fused(conv: nn.Module, norm: nn.Module) -> Tensor:
    """As LeViT and RepVGG fuse themselves."""
    return conv.weight * (norm.weight / (norm.running_var + norm.eps) ** 0.5)[:, None, None, None]


@pytest.mark.parametrize(
    "make",
    [normwise.BatchNorm2d, normwise.SyncBatchNorm, normwise.BatchRenorm2d, normwise.FrozenBatchNorm2d],
)
@pytest.mark.parametrize(
    "tool",
    [
        lambda m: nn.SyncBatchNorm.convert_sync_batchnorm(m),
        lambda m: nn.Sequential(nn.utils.fusion.fuse_conv_bn_eval(m[0], m[1])),
        lambda m: nn.Sequential(nn.utils.fusion.fuse_linear_bn_eval(nn.Linear(3, 4).eval(), m[1])),
        lambda m: nn.Sequential(m[0], frozen(m[1])),
        lambda m: fused(m[0], m[1]),
    ],
    ids=["convert_sync_batchnorm", "fuse_conv_bn_eval", "fuse_linear_bn_eval", "freeze", "fuse"],
)
def test_tools_that_know_torch_s_batch_norm_do_not_drop_an_activation(make, tool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), make(4, act="relu")).eval()
    if make is normwise.FrozenBatchNorm2d and "convert_sync" in inspect.getsource(tool):
        return  # no BatchNorm to torch, which leaves it alone
    with pytest.raises(RuntimeError, match=REFUSED):
        tool(copy.deepcopy(model))
    model[1].act = None
    tool(copy.deepcopy(model))


def test_torch_s_synchronized_layer_takes_over_from_one_without_an_activation() -> None:
    model = nn.Sequential(normwise.BatchNorm2d(4)).eval()
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    x = torch.randn(2, 4, 3, 3)
    assert type(converted[0]) is nn.SyncBatchNorm
    assert list(converted.state_dict()) == list(model.state_dict())
    torch.testing.assert_close(converted(x), model(x))


def test_torch_s_encoder_does_not_drop_an_activation() -> None:
    """In evaluation it hands the norms' tensors and eps to one kernel."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).eval()
    layer.norm1 = normwise.LayerNorm(8, act="relu")
    x = torch.randn(2, 5, 8)
    with torch.no_grad(), pytest.raises(RuntimeError, match=REFUSED):
        layer(x)
    layer.norm1.act = None
    with torch.no_grad():
        quick = layer(x)
    torch.testing.assert_close(quick, layer.train()(x))


@ACTIVATED
def test_eps_is_kept_set_copied_and_shown(sample: Sample) -> None:
    layer, x = sample.make(), sample.input()
    expected = layer.eval()(x)
    assert f"act={layer.act!r}" in repr(layer)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert eps_of(other) == vars(other)["eps"] == vars(layer)["eps"]
        same(other(x), expected)
    assert "eps" not in dict(inspect.getmembers(layer))
    layer.eps = 0.5
    assert not torch.allclose(layer(x), expected)
    layer.act = None
    assert layer.eps == 0.5


@PLAIN
def test_eps_without_an_activation_is_an_attribute_as_in_torch(sample: Sample) -> None:
    layer = sample.make()
    assert layer.eps == eps_of(layer)
    assert "eps" in dir(layer)


@each_layer
def test_script_is_refused_in_words(sample: Sample) -> None:
    for model in (sample.make(), nn.Sequential(nn.Sequential(nn.Identity(), sample.make()))):
        with pytest.raises(RuntimeError, match=r"torch.jit.script cannot compile \w+: use"):
            torch.jit.script(model)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("sample", [s for s in NORMS if "virtual_batch_size" not in s.kwargs], ids=str)
def test_a_graph_of_jit_trace_does_the_same_on_other_batches(sample: Sample, training: bool) -> None:
    layer = sample.make().train(training)
    other, x = copy.deepcopy(layer), sample.input()
    traced = torch.jit.trace(layer, x, check_trace=False)
    other(x)
    for samples in (len(x), len(x), len(x) + 3, 2):  # optimized after the first
        batch = torch.randn(samples, *x.shape[1:])
        torch.testing.assert_close(traced(batch), other(batch))
    for (name, actual), (_, expected) in zip(traced.named_buffers(), other.named_buffers(), strict=True):
        torch.testing.assert_close(actual, expected, msg=lambda text, name=name: f"{name}: {text}")


def test_jit_trace_of_a_training_that_goes_by_each_batch_is_refused() -> None:
    layer, x = normwise.BatchNorm1d(3, virtual_batch_size=2), torch.randn(4, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(RuntimeError, match=r"trace it in eval mode, or use torch.compile"):
            torch.jit.trace(layer, x)
        torch.testing.assert_close(torch.jit.trace(layer.eval(), x)(x), layer(x))


@each_layer
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
def test_default_device_and_dtype_change_no_layer_that_exists(sample: Sample, default: torch.dtype) -> None:
    layer, x = sample.make(), sample.input()
    other = copy.deepcopy(layer)
    expected = trained_once(layer, x)
    upstream_aside = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        actual = trained_once(other, x)
        with torch.device("meta"):
            evaluated = other.eval()(x)
    finally:
        torch.set_default_dtype(upstream_aside)
    for name, value in actual.items():
        same(value, expected[name])
    same(evaluated, layer.eval()(x))


@each_layer
def test_a_default_device_changes_no_training_step(sample: Sample) -> None:
    layer, x = sample.make(), sample.input()
    other = copy.deepcopy(layer)
    expected = trained_once(layer, x)
    with torch.device("meta"):
        outputs = other.train()(x)
    same(outputs, expected["outputs"])
    same(list(other.state_dict().values()), expected["state"])
