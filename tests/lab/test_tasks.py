from __future__ import annotations

import json
import math
from dataclasses import dataclass

import pytest
import torch

import normwise
from normwise.lab import watch
from normwise.lab.errors import LabError, UndefinedError
from normwise.lab.norms import NORM_LAYERS, feature_norm, groups, image_norm
from normwise.lab.tasks import TASKS, Batch, Task, load_task

each_task = pytest.mark.parametrize("name", TASKS)


def built(task, norm):
    try:
        return task.model(norm, 3)
    except UndefinedError:
        return None


def normalizes(module):
    recurrence = getattr(module, "recurrence", None)
    return isinstance(module, NORM_LAYERS) or (recurrence is not None and recurrence.norm is not None)


@each_task
def test_weights_depend_on_the_seed_and_not_on_the_norm(name):
    task = load_task(name).task

    def weights(model):
        return torch.cat([weight.flatten() for weight in watch.weights(model).values()])

    models = [model for norm in task.norms if (model := built(task, norm)) is not None]
    assert len(models) >= 4
    for model in models[1:]:
        assert torch.equal(weights(model), weights(models[0]))
    assert not torch.equal(weights(task.model("none", 4)), weights(models[0]))


@each_task
def test_the_norms_are_normwise_s_own(name):
    task = load_task(name).task
    for norm in set(task.norms) - {"none"}:
        model = built(task, norm)
        if model is not None:
            layers = [m for m in model.modules() if normalizes(m)]
            assert layers
            assert all(type(m).__module__.startswith("normwise.") for m in layers)
    assert not any(normalizes(m) for m in task.model("none", 0).modules())


@each_task
def test_batches_are_the_same_each_time_and_cover_an_epoch(name):
    task = load_task(name).task
    train, _ = task.cases
    size = 10

    def targets(seed, steps):
        return [batch.targets.flatten() for batch in task.batches(size, steps, seed)]

    assert all(map(torch.equal, targets(0, 5), targets(0, 5)))
    assert not torch.equal(targets(0, 1)[0], targets(1, 1)[0])
    whole = len(train) // size
    epoch, every = torch.cat(targets(0, whole)), train.targets.flatten()
    assert len(epoch) == whole * size * train.targets[0].numel()  # but for a batch that would be incomplete, all
    lowest = every.min()  # that of padding is negative
    once = (every - lowest).bincount()
    assert ((epoch - lowest).bincount(minlength=len(once)) <= once).all()  # and none twice


def test_mlp_is_that_of_the_paper():
    model = load_task("mlp").task.model("batch", 0)
    assert [tuple(m.weight.shape) for m in model if isinstance(m, torch.nn.Linear)] == [
        (100, 784),
        (100, 100),
        (100, 100),
        (10, 100),
    ]
    assert [type(m) for m in model].count(torch.nn.Sigmoid) == 3
    inputs = load_task("mlp").task.cases[0].inputs
    assert inputs.unique().tolist() == [0, 1]


def test_a_sequence_batch_loses_the_padding_that_it_does_not_need():
    batch = Batch(torch.arange(24.0).reshape(3, 4, 2), torch.tensor([0, 1, 2]), torch.tensor([4, 2, 1]))
    part = batch.select(torch.tensor([2, 1]))
    assert part.inputs.tolist() == batch.inputs[[2, 1], :2].tolist()
    assert (part.targets.tolist(), part.lengths.tolist()) == ([2, 1], [1, 2])


@pytest.mark.parametrize("channels", [1, 8, 12, 16, 100, 7])
def test_groups_divide_the_channels(channels):
    assert channels % groups(channels) == 0
    assert 1 <= groups(channels) <= 8


@pytest.mark.parametrize("name", load_task("cnn").task.norms)
def test_image_norms_keep_the_shape_and_standardize_what_they_say(name):
    x = 3 + 2 * torch.randn(6, 8, 5, 5)
    y = image_norm(name, 8, 5, 5)(x)
    axes = {"batch": (0, 2, 3), "layer": (1, 2, 3), "instance": (2, 3)}
    assert y.shape == x.shape
    if name in axes:
        torch.testing.assert_close(y.mean(axes[name]), torch.zeros_like(y.mean(axes[name])), atol=1e-5, rtol=0)
    if name == "rms":
        torch.testing.assert_close(y.square().mean((1, 2, 3)), torch.ones(6))
    if name == "group":
        parts = y.reshape(6, 2, -1)
        torch.testing.assert_close(parts.mean(-1), torch.zeros(6, 2), atol=1e-5, rtol=0)


def test_feature_norms():
    assert isinstance(feature_norm("batch", 4), normwise.BatchNorm1d)
    with pytest.raises(UndefinedError, match="one position a channel"):
        feature_norm("instance", 4)
    with pytest.raises(LabError, match=r"unknown norm 'bacth'; did you mean batch\? \(known: none, batch"):
        feature_norm("bacth", 4)


@pytest.mark.parametrize(
    ("reference", "text", "message"),
    [
        ("mpl", None, r"unknown task 'mpl'; did you mean mlp\?"),
        ("charlm", None, "'charlm' stands for several tasks: name one of charlm-lstm, charlm-gru, charlm-transformer"),
        ("task.py", "", "not of the form FILE.py:function"),
        ("missing.py:make", None, "no such file"),
        ("task.py:make", "x = 1", "no function 'make'"),
        ("task.py:make", "make = dict", "returned dict, expected a normwise.lab.tasks.Task"),
        ("task.py:make", "from normwise.lab.tasks.mlp import Mlp as make", "'mlp' belongs to a built-in task"),
    ],
)
def test_what_is_no_task_is_named(reference, text, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        (tmp_path / "task.py").write_text(text)
    load_task.cache_clear()
    with pytest.raises(LabError, match=message):
        load_task(reference)


GOOD = Batch(torch.zeros(4, 2), torch.zeros(4).long())


def made_of(data, **settings):
    @dataclass(frozen=True)
    class Mine(Task):
        name = "mine"
        rate: object = None

        def data(self):
            return data

        def model(self, norm, seed):
            raise NotImplementedError

    return Mine(**settings)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            ((1, 2), (3, 4)),
            r"returned tuple of \(tuple, tuple\), expected a tuple of two batches, to train on",
        ),
        ((GOOD, (3, 4)), r"returned tuple of \(Batch, tuple\)"),
        ((GOOD,), r"returned tuple of \(Batch\)"),
        ([GOOD, GOOD], r"returned list of \(Batch, Batch\), expected a tuple"),
        (GOOD, r"returned Batch, expected"),
        (None, r"returned NoneType, expected"),
        (
            (GOOD, Batch(torch.zeros(4, 2), torch.zeros(3))),
            r"cases held out of task 'mine' have 4 inputs, 3 targets",
        ),
        ((Batch(torch.zeros(0, 2), torch.zeros(0)), GOOD), r"the cases to train on .* have 0 inputs, 0 targets: exp"),
        ((GOOD, Batch(torch.zeros(2, 2), torch.zeros(2), torch.ones(1))), r"2 inputs, 2 targets, 1 lengths"),
        ((GOOD, Batch(torch.zeros(2, 2), torch.zeros(2))), r"targets held out .* torch.float32: .*targets\.long\(\)"),
    ],
)
def test_data_that_are_no_two_batches_are_named(data, message):
    with pytest.raises(LabError, match=message):
        _ = made_of(data).cases


def test_settings_are_what_json_holds_and_still_tell_runs_apart():
    values = [math.inf, -math.inf, math.nan, 1.5, True, None, "a", (1, [math.inf]), {1: 2.5}]
    settings = [json.dumps(made_of(None, rate=value).settings, allow_nan=False) for value in values]
    assert len(set(settings)) == len(values)
    with pytest.raises(LabError, match="hyperparameter 'rate' of task 'mine' is of type dtype"):
        _ = made_of(None, rate=[torch.float32]).settings
