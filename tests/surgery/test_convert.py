"""convert: what stands where afterwards, what was carried, and what it leaves alone."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import normwise
from normwise.backends.activations import ACTIVATIONS
from support.norm_cases import CASES, randomize
from support.surgery_models import IMAGES, assert_same_state, net, state
from support.tolerances import assert_close


def ours(layer: nn.Module) -> bool:
    return type(layer).__module__.startswith("normwise.")


@pytest.mark.parametrize(
    ("to", "wanted"),
    [
        ("group", normwise.GroupNorm),
        ("layer", normwise.LayerNorm),
        ("batch", nn.modules.batchnorm._BatchNorm),
        ("renorm", nn.modules.batchnorm._BatchNorm),
        ("sync", normwise.SyncBatchNorm),
        ("frozen", normwise.nn.frozen_batch_norm.FrozenBatchNorm),
    ],
)
def test_every_batch_norm_becomes_the_target_at_any_depth(to, wanted):
    model = net()
    before = state(model)
    new, report = normwise.convert(model, to=to)
    places = ["stem.1", "shared", "blocks.0.norm", "blocks.1.norm", "head.1"]
    for name in places:
        assert isinstance(new.get_submodule(name), wanted)
        assert ours(new.get_submodule(name))
    assert new.shared is new.stem[1]
    assert new(torch.randn(IMAGES)).isfinite().all()
    assert {name for change in report.changed for name in change.name.split(", ")} >= set(places)
    assert_same_state(model, before)
    assert type(model.stem[1]) is nn.BatchNorm2d


@pytest.mark.parametrize("to", ["batch", "frozen", "normwise", "renorm"])
def test_kinds_of_batch_norm_keep_statistics_and_results(to):
    model = net().eval()
    new, _ = normwise.convert(model, to=to)
    x = torch.randn(IMAGES)
    assert_close(new(x), model(x), kind="composed", count=100)
    stem = new.stem[1]
    assert stem.eps == 1e-3
    assert torch.equal(stem.running_mean, model.stem[1].running_mean)
    back, _ = normwise.convert(new, to="torch")
    assert not any(ours(layer) for layer in back.modules())
    assert_close(back.eval()(x), model(x), kind="composed", count=100)


def test_there_and_back_trains_like_the_original():
    """momentum, counters, statistics and parameters: the state after a step is the original's."""
    model = net()
    back, _ = normwise.convert(normwise.convert(model, to="normwise").model, to="torch")
    assert back.state_dict().keys() == model.state_dict().keys()
    assert back.stem[1].momentum == 0.3
    x = torch.randn(IMAGES)
    for one in (model, back):
        one(x)
    for name, value in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name


@pytest.mark.parametrize("case", [case for case in CASES if case.truth is None], ids=str)
def test_each_layer_of_torch_becomes_its_namesake_and_back(case):
    theirs = randomize(case.theirs())
    here = normwise.convert(theirs, to="normwise").model
    assert type(here) is getattr(normwise, case.name)
    there = normwise.convert(here, to="torch").model
    assert type(there) is type(theirs)
    assert there.extra_repr() == theirs.extra_repr()
    x = torch.randn(case.shape)
    expected = theirs(x)
    assert torch.equal(there(x), expected)
    assert_close(here(x), expected, count=case.count)


@pytest.mark.parametrize(
    ("layer", "to", "options"),
    [
        (normwise.RMSNorm(32, offset=1.0), "torch", {}),
        (normwise.LayerNorm(32, dim=1, offset=1.0), "group", {}),
        (normwise.LayerNorm(32, dim=1, offset=1.0), "batch", {"spatial": 2}),
        (normwise.LayerNorm(32), "layer", {"offset": 1.0}),
    ],
    ids=str,
)
def test_a_weight_does_not_become_another_gain(layer, to, options):
    """The same parameter, read without its offset, would be off by 1."""
    model = nn.Sequential(layer)
    with pytest.raises(ValueError, match=r"its gain is .*weight, but .* would be .*give the new layer the same"):
        normwise.convert(model, to=to, **options)
    bare = type(layer)(32, 1e-5, dim=1, elementwise_affine=False, offset=1.0)
    assert isinstance(normwise.convert(nn.Sequential(bare), to="group").model[0], nn.GroupNorm)


def test_offset_and_cast_go_on_where_the_new_layer_knows_them():
    layer = randomize(normwise.RMSNorm(32, 1e-5, dim=1, offset=1.0, cast="input"))
    new = normwise.convert(nn.Sequential(layer), to="layer", inplace=True).model[0]
    assert (new.offset, new.cast) == (1.0, "input")
    assert new.weight is layer.weight
    x = torch.randn(2, 32, 3)
    expected = nn.functional.layer_norm(x.mT, (32,), layer.weight + 1).mT
    assert_close(new(x), expected, count=32)
    expected = layer(x)
    layer.weight.data += layer.offset  # as the refusal advises
    layer.offset = 0.0
    assert_close(layer(x), expected, count=32)
    _, report = normwise.convert(nn.Sequential(normwise.LayerNorm(8, cast="input")), to="torch")
    assert "cast='input' has no counterpart" in str(report)


def test_gain_and_bias_go_on_and_a_group_norm_computes_its_formula():
    layer = randomize(nn.BatchNorm2d(12))
    new = normwise.convert(layer, to="group", num_groups=3).model
    x = torch.randn(2, 12, 5, 5)
    assert_close(new(x), nn.functional.group_norm(x, 3, layer.weight, layer.bias), count=100)
    over_channels = normwise.convert(layer, to="layer").model
    by_pixel = nn.functional.layer_norm(x.movedim(1, -1), (12,), layer.weight, layer.bias).movedim(-1, 1)
    assert_close(over_channels(x), by_pixel, count=12)


@pytest.mark.parametrize(
    ("channels", "groups"), [(48, 3), (64, 4), (512, 32), (1024, 32), (1001, 13), (7, 1), (37, 1), (4, 1)]
)
def test_default_groups_divide_the_channels_and_hold_16_of_them_where_there_are(channels, groups):
    """24 groups of the 48 features of a row would hold two values each, and put out +1 and -1 whatever they were."""
    assert normwise.convert(nn.BatchNorm1d(channels), to="group").model.num_groups == groups


def test_parameters_stay_the_same_objects_in_place():
    """An optimizer that was built before goes on, and a tie between two layers holds."""
    model = net()
    model.blocks[1].norm.weight = model.blocks[0].norm.weight
    parameters = list(model.parameters())
    same, _ = normwise.convert(model, to="group", inplace=True)
    assert same is model
    assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]
    assert model.blocks[1].norm.weight is model.blocks[0].norm.weight


def test_mode_dtype_and_requires_grad_are_kept():
    model = net().double()
    model.stem.eval()
    model.stem[1].bias.requires_grad_(False)
    new, _ = normwise.convert(model, to="group")
    assert not new.stem[1].training
    assert new.blocks[0].norm.training
    assert new.stem[1].weight.dtype == torch.float64
    assert new.stem[1].weight.requires_grad
    assert not new.stem[1].bias.requires_grad


def test_device_is_kept(device):
    new, _ = normwise.convert(net().to(device), to="batch")
    assert {t.device.type for t in (*new.parameters(), *new.buffers())} == {device.type}


def test_hooks_are_carried_and_their_handles_still_remove_them():
    layer = nn.BatchNorm1d(4)
    model, seen = nn.Sequential(layer), []
    handle = layer.register_forward_hook(lambda module, args, out: seen.append(type(module)))
    layer.register_full_backward_hook(lambda module, *grads: seen.append("backward"))
    layer.register_load_state_dict_pre_hook(lambda module, *rest: seen.append(("load", type(module))))
    normwise.convert(model, to="group", inplace=True)
    model(torch.randn(3, 4, requires_grad=True)).square().sum().backward()
    model.load_state_dict(model.state_dict())
    assert seen == [normwise.GroupNorm, "backward", ("load", normwise.GroupNorm)]
    handle.remove()
    model(torch.randn(3, 4))
    assert len(seen) == 3


def test_a_parametrized_layer_keeps_its_parametrization():
    class Positive(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.exp()

    layer = nn.BatchNorm1d(4)
    parametrize.register_parametrization(layer, "weight", Positive())
    original = layer.parametrizations.weight.original
    model = nn.Sequential(layer)
    _, report = normwise.convert(model, to="group", num_groups=1, inplace=True)
    assert parametrize.is_parametrized(model[0], "weight")
    assert model[0].parametrizations.weight.original is original
    with torch.no_grad():
        original.fill_(2.0)
    x = torch.randn(3, 4)
    expected = nn.functional.group_norm(x, 1, original.exp(), layer.bias)
    assert_close(model(x), expected, count=4)
    assert "nn.BatchNorm1d -> normwise.GroupNorm" in str(report)


def test_a_subclass_with_its_own_forward_is_left_alone_unless_asked():
    class Derived(nn.BatchNorm1d):
        """Computes what its base does."""

    class Clipped(nn.BatchNorm1d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).clamp(-1, 1)

    model = nn.Sequential(Derived(4), Clipped(4))
    new, report = normwise.convert(model, to="group")
    assert isinstance(new[0], normwise.GroupNorm)
    assert isinstance(new[1], Clipped)
    assert [skip.name for skip in report.skipped] == ["1"]
    assert "subclasses=True" in report.skipped[0].reason
    new, report = normwise.convert(model, to="group", subclasses=True)
    assert isinstance(new[1], normwise.GroupNorm)
    assert "its own forward" in report.changed[1].note
    assert "its own forward" not in report.changed[0].note


def test_an_activation_goes_along():
    layer = randomize(normwise.BatchNorm2d(4, act="relu")).eval()
    x = torch.randn(2, 4, 3, 3)
    plain, report = normwise.convert(layer, to="torch")
    assert [type(part) for part in plain] == [nn.BatchNorm2d, nn.ReLU]
    assert_close(plain(x), layer(x))
    assert "activation" in report.changed[0].note
    grouped, report = normwise.convert(layer, to="group", num_groups=2)
    assert grouped.act == "relu"
    assert "activation" not in report.changed[0].note
    assert_close(grouped(x, residual=x), torch.relu(nn.functional.group_norm(x, 2, layer.weight, layer.bias) + x))
    assert [type(part) for part in normwise.convert(grouped, to="torch").model] == [nn.GroupNorm, nn.ReLU]
    assert normwise.convert(layer, to="layer").model.act == "relu"


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_torch_has_every_activation(act):
    layer, x = normwise.LayerNorm(5, act=act), 3 * torch.randn(7, 5)
    assert_close(normwise.convert(layer, to="torch").model(x), layer(x))


@pytest.mark.parametrize(
    ("layer", "to", "reason"),
    [
        (normwise.LayerNorm(4, dim=1), "torch", "dim=1"),
        (normwise.LSTM(3, 4), "torch", "norm='layer'"),
        (normwise.LSTM(3, 4, norm=None, zoneout=0.1), "torch", "zoneout"),
        (nn.LayerNorm(4), "group", "last axes"),
        (nn.GroupNorm(2, 4), "batch", "spatial="),
        (nn.SyncBatchNorm(4), "batch", "spatial="),
        (nn.GroupNorm(2, 4), "frozen", "no running statistics"),
        (nn.BatchNorm2d(4, track_running_stats=False), "frozen", "track_running_stats"),
        (nn.BatchNorm2d(4, track_running_stats=False), "renorm", "track_running_stats"),
        (nn.LazyBatchNorm2d(), "group", "lazy"),
        (nn.utils.spectral_norm(nn.BatchNorm2d(4)), "group", "weight_orig"),
    ],
)
def test_what_cannot_be_expressed_is_skipped_with_the_reason(layer, to, reason):
    model = nn.Sequential(layer, nn.BatchNorm1d(8))
    new, report = normwise.convert(model, to=to, inplace=True)
    assert new[0] is layer
    assert report.skipped[0].name == "0"
    assert reason in report.skipped[0].reason
    assert reason in str(report)


@pytest.mark.parametrize("to", ["batch", "group", "layer", "sync", "renorm", "normwise"])
def test_what_is_one_already_is_left_alone(to):
    once, _ = normwise.convert(net(), to=to)
    twice, report = normwise.convert(once, to=to, inplace=True)
    assert report.changed == []
    assert "is one already" in str(report)
    assert twice is once


def test_options_reach_the_new_layers():
    new = normwise.convert(net(), to="renorm", momentum=0.01, r_max=2.0).model
    assert (new.stem[1].momentum, new.stem[1].r_max) == (0.01, 2.0)
    assert type(new.head[1]) is normwise.BatchRenorm1d


def test_sync_and_back():
    model = net().eval()
    sync, report = normwise.convert(model, to="sync")
    x = torch.randn(IMAGES)
    assert_close(sync(x), model(x), kind="composed", count=100)
    assert report.skipped[0].layer == "nn.LayerNorm"
    assert isinstance(normwise.convert(sync, to="torch").model.stem[1], nn.SyncBatchNorm)
    back, _ = normwise.convert(sync, to="batch", spatial=2, where=("stem.*", "blocks.*"))
    assert type(back.stem[1]) is normwise.BatchNorm2d
    assert_close(back(x), model(x), kind="composed", count=100)


def test_the_rank_can_be_given():
    new = normwise.convert(nn.GroupNorm(2, 4), to="batch", spatial=2).model
    assert isinstance(new, normwise.BatchNorm2d)


@pytest.mark.parametrize(
    ("where", "converted"),
    [
        ("blocks.*", {"blocks.0.norm", "blocks.1.norm"}),
        (nn.BatchNorm1d, {"head.1"}),
        (("head.*", "stem.1"), {"stem.1", "shared", "head.1"}),
        (lambda name, module: module.num_features == 6, {"head.1"}),
    ],
)
def test_where_chooses_by_name_class_or_function(where, converted):
    model = net()
    model.head[2] = nn.Identity()
    new, _ = normwise.convert(model, to="group", where=where)
    assert {name for name, m in new.named_modules(remove_duplicate=False) if ours(m)} == converted


def test_a_converted_model_pickles():
    new, _ = normwise.convert(net(), to="group")
    x = torch.randn(IMAGES)
    assert torch.equal(pickle.loads(pickle.dumps(new))(x), new(x))


def test_weight_norm_on_a_recurrent_layer_survives():
    lstm = parametrizations.weight_norm(nn.LSTM(3, 4), "weight_hh_l0")
    new = normwise.convert(lstm, recurrent="layer").model
    assert parametrize.is_parametrized(new, "weight_hh_l0")
    assert new(torch.randn(5, 2, 3))[0].isfinite().all()
    with pytest.raises(ValueError, match="remove_parametrizations"):
        normwise.convert(normwise.convert(lstm, to="normwise").model, to="torch")


@pytest.mark.parametrize("to", ["layer", "group", "batch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_eps_that_an_rms_norm_left_to_its_dtype_becomes_a_number(to, dtype):
    model = nn.Sequential(normwise.RMSNorm(16, dim=1, dtype=dtype))
    new, _ = normwise.convert(model, to=to, example=torch.randn(2, 16, 4, 4, dtype=dtype))
    assert new[0].eps == torch.finfo(dtype).eps
