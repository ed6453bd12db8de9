"""convert: what it refuses, in which words, and that nothing has changed then."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import normwise
from support.surgery_models import assert_same_state, net, state


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"to": "grup"}, ValueError, "unknown to='grup'.*'group'"),
        ({}, ValueError, "one of to="),
        ({"to": "group", "recurrent": "layer"}, ValueError, "one of to="),
        ({"recurrent": "weight"}, ValueError, "'layer', 'rms' or 'batch'"),
        ({"to": "group", "where": "nothing.*"}, ValueError, "means none of the model's layers"),
        ({"to": "group", "num_groups": 5}, ValueError, "stem.1"),
        ({"to": "group", "groups": 4}, TypeError, "groups"),
        ({"to": "group", "where": 3}, TypeError, "where must be"),
        ({"recurrent": "layer"}, ValueError, "no recurrent layer.*, and note that a recurrence written out"),
        ({"to": "sync", "process_group": "all"}, TypeError, "process_group must be"),
        ({"to": "renorm", "r_max": 0.5}, ValueError, "r_max must be at least 1"),
    ],
)
@pytest.mark.parametrize("inplace", [False, True])
def test_errors_name_the_cure_and_change_nothing(arguments, error, words, inplace):
    model = net()
    before, layers = state(model), list(model.modules())
    with pytest.raises(error, match=words):
        normwise.convert(model, inplace=inplace, **arguments)
    assert_same_state(model, before)
    assert all(a is b for a, b in zip(model.modules(), layers, strict=True))


@pytest.mark.parametrize(
    ("to", "meant"),
    [
        ("groups", "group"),
        ("GroupNorm", "group"),
        (normwise.GroupNorm, "group"),
        (nn.BatchNorm2d, "batch"),
        ("batch_norm", "batch"),
        ("BatchRenorm1d", "renorm"),
        (nn.SyncBatchNorm, "sync"),
        (normwise.FrozenBatchNorm2d, "frozen"),
        ("RMSNorm", "rms"),
        ("LN", "layer"),
        ("Original", "original"),
        (["group"], None),
        ("instance", None),
    ],
)
def test_the_target_that_was_perhaps_meant_is_named(to, meant):
    with pytest.raises(ValueError, match=r"unknown to=.*expected one of 'batch', 'frozen'") as caught:
        normwise.convert(net(), to=to)
    assert str(caught.value).partition("; ")[2] == (f"did you mean {meant!r}?" if meant else "")
    if meant in ("batch", "layer", "rms"):
        with pytest.raises(ValueError, match=f"plain layers.; did you mean {meant!r}"):
            normwise.convert(net(), recurrent=to)


def test_models_that_cannot_be_converted_say_so():
    with pytest.raises(ValueError, match=r"no normalization layer.*functions .torch\.nn\.functional\.batch_norm"):
        normwise.convert(nn.Linear(2, 2), to="group")
    with pytest.raises(ValueError, match="cannot become another layer in place"):
        normwise.convert(nn.BatchNorm1d(2), to="group", inplace=True)
    with pytest.raises(TypeError, match=r"expects a torch.nn.Module, but got dict"):
        normwise.convert({}, to="group")


def test_a_wrapped_model_is_refused():
    class DistributedDataParallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.BatchNorm1d(3)

    with pytest.raises(TypeError, match="convert the model before it is wrapped"):
        normwise.convert(DistributedDataParallel(), to="group")


def test_a_model_that_cannot_be_copied_names_the_cure():
    layer = nn.BatchNorm1d(4)
    layer.cache = layer.weight * 2  # a result of autograd, which torch does not copy
    with pytest.raises(RuntimeError, match="inplace=True"):
        normwise.convert(nn.Sequential(layer), to="group")
    assert normwise.convert(nn.Sequential(layer), to="group", inplace=True).report.changed


class OnChannels(nn.LayerNorm):
    """As ConvNeXt's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    ("model", "arguments", "words"),
    [
        (nn.Sequential(OnChannels(8)), {"to": "group"}, "0: OnChannels: it has a forward of its own"),
        (nn.Sequential(nn.LayerNorm(8), nn.RMSNorm(8)), {"to": "batch"}, "(?s)0: nn.LayerNorm: .*1: nn.RMSNorm: "),
        (nn.LayerNorm(8), {"to": "sync"}, "(the model).*: nn.LayerNorm: its statistics are not over the batch"),
        (nn.LSTM(3, 4), {"to": "torch", "where": "nothing"}, "means none"),
        (normwise.LSTM(3, 4), {"to": "torch"}, "torch.nn has no layer with norm='layer'"),
        (normwise.LSTM(3, 4), {"recurrent": "rms"}, "has norm='layer' inside already"),
        (nn.Sequential(nn.BatchNorm1d(2)), {"to": "group"}, "to='renorm'"),
    ],
)
@pytest.mark.parametrize("inplace", [False, True])
def test_a_call_that_would_change_nothing_says_what_was_found_and_why_it_stays(model, arguments, words, inplace):
    before, layers = state(model), list(model.modules())
    if inplace and len(layers) == 1:
        words = "cannot become another layer in place"
    with pytest.raises(ValueError, match=words):
        normwise.convert(model, inplace=inplace, **arguments)
    assert_same_state(model, before)
    assert all(a is b for a, b in zip(model.modules(), layers, strict=True))


def test_the_pair_that_comes_back_is_not_the_model():
    pair = normwise.convert(net(), to="group")
    with pytest.raises(TypeError, match=r"model, report = normwise\.convert"):
        pair(torch.randn(2, 3, 8, 8))
    for method in ("train", "parameters", "to"):
        with pytest.raises(AttributeError, match=f"'{method}': .*model, report = normwise.convert"):
            getattr(pair, method)
    with pytest.raises(AttributeError, match=r"no attribute 'modle'$"):
        pair.modle  # noqa: B018
    model, report = copy.deepcopy(pair)
    assert isinstance(model.stem[1], normwise.GroupNorm)
    assert str(report) == str(pair.report)


def test_a_class_and_its_parameters_are_no_model():
    with pytest.raises(TypeError, match=r"got the class Linear: make a model of it first, Linear\(\.\.\.\)"):
        normwise.convert(nn.Linear, to="group")
    for parameters in (nn.Linear(2, 2).parameters(), [*nn.Linear(2, 2).parameters()]):
        with pytest.raises(TypeError, match=r"decay_groups expects .*: give the model itself, not model\.parameters"):
            normwise.decay_groups(parameters, 0.01)
    with pytest.raises(ValueError, match="got the class Linear"):
        normwise.diagnose(nn.Linear, [])
