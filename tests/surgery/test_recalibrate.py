"""recalibrate: population statistics, whatever the batches look like, and a model that is otherwise untouched."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from torch import Tensor, nn

import normwise
from support.surgery_models import IMAGES, assert_same_state, net, state
from support.tolerances import assert_close


def truth(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance of each channel (axis 1) in float64."""
    rows = values.double().movedim(1, 0).flatten(1)
    return rows.mean(1), rows.var(1, unbiased=True)


def assert_statistics(layer: nn.Module, values: Tensor) -> None:
    mean, var = truth(values)
    count = values.numel() // values.shape[1]
    assert_close(layer.running_mean, mean, count=count, scale=float(values.abs().max()))
    assert_close(layer.running_var, var, count=count, scale=float(var.max()))


def uneven(x: Tensor) -> list[Tensor]:
    """The same data in batches of very different sizes and levels."""
    return [x[:2], x[2:3], x[3:]]


@pytest.mark.parametrize("layer", [nn.BatchNorm2d, normwise.BatchNorm2d])
@pytest.mark.parametrize("exact", [False, True])
def test_statistics_are_those_of_all_values(layer, exact, device):
    x = torch.randn(9, 3, 4, 5, device=device) * 2 + torch.arange(9, device=device).view(-1, 1, 1, 1)
    model = nn.Sequential(layer(3, device=device), nn.Dropout(0.5))
    report = normwise.recalibrate(model, uneven(x), exact=exact)
    assert_statistics(model[0], x)
    assert int(model[0].num_batches_tracked) == 3
    assert "180 values" in str(report)


def test_torchs_cumulative_average_loses_what_the_batches_differ_by():
    """What update_bn computes on the same batches: wrong in the variance and in the weight of small batches."""
    x = torch.randn(9, 3) + torch.arange(9).view(-1, 1)
    averaged, ours = nn.BatchNorm1d(3, momentum=None), nn.BatchNorm1d(3)
    batches = [x[:2], x[2:]]
    for batch in batches:
        averaged(batch)
    normwise.recalibrate(ours, batches)
    _, var = truth(x)
    assert (averaged.running_var - var).abs().max() > 1
    assert_statistics(ours, x)


def test_exact_is_what_evaluation_meets_however_the_data_are_cut():
    model, x = net(), torch.randn(12, *IMAGES[1:])
    cuts = [x.split(12), x.split(5), x.split(1)]
    states = []
    for batches in cuts:
        one = copy.deepcopy(model)
        normwise.recalibrate(one, batches, exact=True)
        states.append(one)
    met: dict[str, Tensor] = {}
    layers = {name: m for name, m in states[0].named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    del layers["stem.1"]  # stands in two places and is called twice
    for name, layer in layers.items():
        layer.register_forward_pre_hook(lambda module, args, name=name: met.__setitem__(name, args[0]))
    with torch.no_grad():
        states[0].eval()(x)
    assert len(met) == 3
    for name, values in met.items():
        assert_statistics(layers[name], values)
    for other in states[1:]:
        for name, value in states[0].named_buffers():
            if "tracked" not in name:
                assert_close(dict(other.named_buffers())[name], value, kind="composed", count=1000)


def test_one_pass_normalizes_by_batch_statistics_as_update_bn_does():
    model, x = net(), torch.randn(IMAGES)
    model.shared = nn.Identity()  # called twice a batch, a layer would count as two batches there
    reference = copy.deepcopy(model)
    torch.optim.swa_utils.update_bn([x], reference)
    normwise.recalibrate(model, [x])
    assert int(model.stem[1].num_batches_tracked) == 1
    for name, value in reference.named_buffers():
        assert_close(dict(model.named_buffers())[name].double(), value.double(), dtype=torch.float32, kind="composed")


def test_mask_lengths_and_packed_input_count():
    x, lengths = torch.randn(3, 4, 6), torch.tensor([2, 6, 3])
    valid = torch.arange(6) < lengths[:, None]
    rows = x.transpose(1, 2)[valid]
    packed = nn.utils.rnn.pack_padded_sequence(x.transpose(1, 2), lengths, batch_first=True, enforce_sorted=False)
    ways = [
        ({"input": x.masked_fill(~valid[:, None], torch.nan), "lengths": lengths}, {}),
        ({"input": x, "mask": valid}, {}),
        (packed, {"forward": lambda model, batch: model(batch)}),
    ]
    for batch, how in ways:
        model = normwise.BatchNorm1d(4)
        normwise.recalibrate(model, [batch], **how)
        assert_statistics(model, rows)


@pytest.mark.parametrize(
    ("wrap", "forward"),
    [
        (lambda x: (x, torch.zeros(len(x))), None),
        (lambda x: [x, "label"], None),
        (lambda x: {"input": x}, None),
        (lambda x: ("label", x), lambda model, batch: model(batch[1])),
    ],
)
def test_any_structure_of_batches(wrap, forward):
    x = torch.randn(9, 3)
    model = nn.BatchNorm1d(3)
    normwise.recalibrate(model, (wrap(part) for part in x.split(4)[:2]), forward=forward)
    assert_statistics(model, x[:8])


def test_averaged_weights():
    """SWA: the averaged model's statistics belong to other weights until they are taken anew."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    averaged = torch.optim.swa_utils.AveragedModel(model)
    with torch.no_grad():
        model[0].weight.mul_(3)
    averaged.update_parameters(model)
    x = torch.randn(50, 3)
    normwise.recalibrate(averaged, x.split(20))
    assert_statistics(averaged.module[1], averaged.module[0](x).detach())


def test_everything_else_stays():
    model = net()
    model.blocks[0].eval()
    normwise.freeze(model, where="head.1")
    modes = {name: module.training for name, module in model.named_modules()}
    parameters = {name: p.clone() for name, p in model.named_parameters()}
    frozen = model.head[1].running_mean.clone()
    report = normwise.recalibrate(model, [torch.randn(IMAGES)])
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(p, parameters[name]) for name, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(model.head[1].running_mean, frozen)
    assert [(skip.name, "frozen" in skip.reason) for skip in report.skipped] == [("head.1", True)]
    assert model.stem[1].momentum == 0.3
    assert not any(module._forward_pre_hooks for module in model.modules())


def broken(x: Tensor, after: int):
    for _ in range(after):
        yield x
    raise OSError("disk")


def refusing(model: nn.Module, batch: Tensor) -> Tensor:
    model(batch)
    raise RuntimeError("out of memory")


@pytest.mark.parametrize(
    ("batches", "options", "error", "words"),
    [
        (lambda x: [], {}, ValueError, "no batch came"),
        (lambda x: [], {"exact": True}, ValueError, "no batch came"),
        (lambda x: iter([x]), {"exact": True}, ValueError, "pass a list or a DataLoader"),
        (lambda x: broken(x, 2), {}, OSError, "disk"),
        (lambda x: [x], {"forward": refusing}, RuntimeError, "out of memory"),
        (lambda x: [x, x], {"forward": refusing, "exact": True}, RuntimeError, "out of memory"),
        (lambda x: [x[:1]], {}, ValueError, r"more than 1 value per channel(?s:.*)exact=True"),
        (lambda x: [x * torch.nan], {}, ValueError, "no finite value"),
        (lambda x: x, {}, TypeError, r"but got Tensor: \[x\] is one batch"),
        (lambda x: 5, {}, TypeError, "such as a DataLoader"),
        (lambda x: [x], {"where": "none"}, ValueError, "means none"),
        (lambda x: [x], {"forward": lambda model, batch: None}, ValueError, "did not call it"),
        (lambda x: [x], {"process_group": "all"}, TypeError, "process_group must be"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*skipped an update of its running averages")
def test_after_an_error_the_model_is_as_it_was(batches, options, error, words):
    model = nn.Sequential(net(), normwise.BatchNorm1d(2))
    before = state(model)
    with pytest.raises(error, match=words):
        normwise.recalibrate(model, batches(torch.randn(IMAGES)), **options)
    assert_same_state(model, before)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_batch_that_is_not_finite_is_left_out():
    x = torch.randn(8, 3)
    model = nn.BatchNorm1d(3)
    report = normwise.recalibrate(model, [x, x * torch.inf])
    assert_statistics(model, x)
    assert "skipped as not finite: 1" in report.changed[0].note


def test_models_without_statistics_say_so():
    with pytest.raises(TypeError, match=r"recalibrate expects a torch.nn.Module, but got int"):
        normwise.recalibrate(5, [])
    with pytest.raises(ValueError, match="no norm with running statistics"):
        normwise.recalibrate(nn.LayerNorm(3), [torch.randn(2, 3)])
    with pytest.raises(ValueError, match="track_running_stats=False"):
        normwise.recalibrate(nn.BatchNorm1d(3, track_running_stats=False), [torch.randn(2, 3)])
    others = [
        normwise.LSTM(3, 4, norm="batch"),
        normwise.FrozenBatchNorm1d(3),
        nn.InstanceNorm1d(3, track_running_stats=True),
        normwise.LSTM(3, 4),  # keeps none, and is not mentioned
    ]
    model = nn.ModuleList([nn.BatchNorm1d(3), *others])
    report = normwise.recalibrate(model, [torch.randn(4, 3)], forward=lambda m, x: m[0](x))
    reasons = {skip.name: skip.reason for skip in report.skipped}
    assert reasons.keys() == {"1", "2", "3"}
    assert "did not call it" in reasons["1"]
    assert "did not call it" in reasons["3"]
    assert reasons["2"] == "its statistics are fixed"


def test_progress_is_told(capsys, monkeypatch):
    x, told = torch.randn(8, 3), []
    normwise.recalibrate(nn.BatchNorm1d(3), x.split(2), progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    told.clear()
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    normwise.recalibrate(model, iter(x.split(4)), progress=lambda done, total: told.append((done, total)))
    assert told == [(1, None), (2, None)]
    normwise.recalibrate(model, x.split(4), exact=True, progress=True)  # a bar
    monkeypatch.setitem(sys.modules, "rich.progress", None)  # as if rich were not installed
    normwise.recalibrate(model, x.split(4), progress=True)
    assert "batch 2 of 2" in capsys.readouterr().err


def test_a_compiled_model_is_run_uncompiled():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(16, 3)
    compiled(x)
    normwise.recalibrate(compiled, x.split(4))
    assert_statistics(model[1], model[0](x).detach())
