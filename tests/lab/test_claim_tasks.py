"""The set-ups that one claim each is about."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn

from normwise.lab import tasks, watch
from normwise.lab.errors import LabError
from normwise.lab.run import run
from normwise.lab.spec import Spec, expand
from normwise.lab.tasks import CLAIM_TASKS, TASKS, Task, load_task, relu_mlp
from normwise.lab.tasks.bn_finetune import BnFinetune
from normwise.lab.tasks.mlp import Mlp

MORE = {
    "bn-finetune": {"untuned", "fast", "slow", "frozen", "recalibrated"},
    "bn-leak": {"train-mode", "eval-mode"},
    "dropout-after-bn": {"recalibrated"},
    "dropout-before-bn": {"recalibrated"},
    "precise-bn": {"recalibrated"},
}
each_task = pytest.mark.parametrize("name", [name for name in CLAIM_TASKS if not name.startswith("charlm")])


def short(name: str, norm: str | None = None, steps: int = 3) -> Spec:
    task = load_task(name).task
    return Spec(name, norm or task.norms[0], task.batch_sizes[0], task.learning_rates[0], 1, steps)


def numbers(result):
    return {name: of.values for name, of in result.series.items() if not name.startswith("time/")}


@each_task
def test_a_few_steps_are_the_same_each_time_and_record_what_the_claim_reads(name):
    first, second = run(short(name)), run(short(name))
    assert first.status == "done"
    assert numbers(first) == numbers(second)
    assert all(math.isfinite(value) for of in numbers(first).values() for value in of)
    parts = {key.split("/")[1] for key in first.series if key.startswith("final/") and key.count("/") == 2}
    assert parts == MORE.get(name, set())


@each_task
def test_weights_depend_on_the_seed_and_not_on_the_norm(name):
    task = load_task(name).task

    def weights(norm, seed):
        return torch.cat([weight.flatten() for weight in watch.weights(task.model(norm, seed)).values()])

    assert all(torch.equal(weights(norm, 3), weights(task.norms[0], 3)) for norm in task.norms)
    assert not torch.equal(weights(task.norms[0], 3), weights(task.norms[0], 4))


def test_they_can_be_asked_for_by_name_and_no_list_shows_them():
    assert not CLAIM_TASKS.keys() & TASKS.keys()
    assert {name: load_task(name).task.name for name in CLAIM_TASKS} == {name: name for name in CLAIM_TASKS}
    with pytest.raises(LabError, match=r"unknown task 'bn-leek'") as raised:
        load_task("bn-leek")
    assert "precise-bn" not in str(raised.value)


def test_groups_are_of_one_class_and_half_black_and_every_batch_has_all_classes():
    task = load_task("bn-leak").task
    batches = list(task.batches(80, 55, 0))  # an epoch is 50
    for batch in batches:
        groups = batch.targets.view(10, 8)
        assert (groups == groups[:, :1]).all()
        assert groups[:, 0].unique().tolist() == list(range(10))
        brightest = batch.inputs.view(10, 8, 784).amax(-1)
        assert (brightest[:, :4] > 2).all()  # standardized: white is 2.8, black -0.4
        assert (brightest[:, 4:] < 0).all()
    seen = torch.cat([batch.inputs.view(10, 8, 784)[:, :4].flatten(0, 1) for batch in batches[:50]])
    assert len(seen) == 2000
    assert len(seen.unique(dim=0)) > 1990  # some digits are stored twice
    assert float(task.cases[0].inputs.amin(1).max()) < 0
    assert float(task.cases[0].inputs.amax(1).min()) > 2  # the cases themselves are as they were
    assert not torch.equal(batches[0].inputs, batches[50].inputs)
    with pytest.raises(LabError, match="batch size 40 is not a multiple of 80"):
        next(task.batches(40, 1, 0))


@pytest.mark.parametrize("norm", ["layer", "group"])
def test_what_has_no_running_statistics_is_as_accurate_in_both_modes(norm):
    result = run(short("bn-leak", norm, steps=5))
    in_training, in_eval = (result.series[f"final/{mode}-mode/accuracy"].values for mode in ("train", "eval"))
    assert in_training == in_eval


def test_recalibration_sees_the_classes_mixed(monkeypatch):
    """The training cases are stored class by class."""
    task, batches = load_task("precise-bn").task, []
    monkeypatch.setattr(relu_mlp, "recalibrate", lambda model, given: batches.extend(given))
    task.recalibrated(task.model("batch", 0))
    cases = {
        case.numpy().tobytes(): int(label)
        for case, label in zip(task.cases[0].inputs, task.cases[0].targets, strict=True)
    }
    assert [len({cases[case.numpy().tobytes()] for case in batch}) for batch in batches] == [10] * 20


def test_dropout_stands_where_it_is_said():
    def places(name):
        net = load_task(name).task.model("batch", 0)
        return [type(module).__name__ for module in net if isinstance(module, (nn.BatchNorm1d, nn.Dropout))]

    assert places("dropout-before-bn") == ["BatchNorm1d", "Dropout"] * 4
    assert places("dropout-after-bn") == ["BatchNorm1d"] * 4 + ["Dropout"]


@pytest.mark.parametrize(("name", "head"), [("alone", False), ("and-head", True)])
def test_as_many_weights_are_trained_as_gains_and_biases(name, head):
    """What a step changes, number by number."""
    changed = {}
    for what in ("norms", "weights"):
        task = load_task(f"{what}-{name}").task
        model, before = task.model("batch", 0).train(), task.model("batch", 0).state_dict()  # of another net
        optimizer = task.optimizer(model, 0.1)
        for batch in task.batches(64, 2, 0):
            task.loss(task.forward(model, batch), batch).backward()
            optimizer.step()
        changed[what] = {
            key: int((parameter != before[key]).sum())
            for key, parameter in model.named_parameters()
            if not torch.equal(parameter, before[key])
        }
    of_head = {"linear.weight": 320, "linear.bias": 10} if head else {}
    assert {key: n for key, n in changed["norms"].items() if "linear" in key} == of_head
    kernels = {key: n for key, n in changed["weights"].items() if "linear" not in key}
    gains = {key: n for key, n in changed["norms"].items() if "norm" in key}
    assert sum(kernels.values()) == sum(gains.values()) == 2 * 208
    assert all("conv" in key for key in kernels)
    assert len(gains) + len(of_head) == len(changed["norms"])


def test_labels_are_drawn_anew_for_each_task_and_stay_within_it():
    task = dataclasses.replace(load_task("plasticity").task, task_steps=50)
    assert task.cases[0].inputs.shape == (1200, 196)
    labels = []
    both = list(task.batches(48, 100, 0))
    for batches in (both[:50], both[50:]):
        pairs = {}
        for batch in batches:
            for digit, label in zip(batch.inputs, batch.targets.tolist(), strict=True):
                pairs.setdefault(digit.numpy().tobytes(), set()).add(label)
        assert len(pairs) == 1200
        assert {len(of) for of in pairs.values()} == {1}
        labels.append({digit: min(of) for digit, of in pairs.items()})
    same = sum(labels[0][digit] == labels[1][digit] for digit in labels[0])
    assert 60 < same < 180  # a tenth of 1,200, by chance


def test_statistics_come_along_as_far_as_the_momentum_says():
    """From running means of 0, on one batch again and again, and without a rate."""
    task = BnFinetune(fine_rate=1e-12)
    batch = task.cases[0].select(slice(0, 8))

    def means(momentum, frozen=False):
        tuned = task._tuned(task.model("batch", 0), [batch] * 30, momentum, frozen)
        return tuned.norm1.running_mean

    weight = (1 - 0.99**30) / (1 - 0.9**30)
    # Thirty float32 steps of two averages, each rounded at each step.
    torch.testing.assert_close(means(0.01), weight * means(0.1), rtol=1e-4, atol=1e-6)
    assert not means(0.1, frozen=True).any()


def test_the_rate_is_what_the_task_makes_of_it(monkeypatch):
    task = load_task("precise-bn").task
    assert [task.rate_factor(step, 10) for step in (0, 4, 5, 8, 9)] == pytest.approx([1, 1, 1, 0.4, 0.2])

    seen = []

    class Slower(Mlp):
        def rate_factor(self, step, steps):
            return 1 / (step + 1)

        def optimizer(self, model, learning_rate):
            made = super().optimizer(model, learning_rate)
            made.register_step_post_hook(lambda optimizer, *_: seen.append(optimizer.param_groups[0]["lr"]))
            return made

    monkeypatch.setitem(tasks.BUILT_IN, "mlp", Slower)
    load_task.cache_clear()
    try:
        run(Spec("mlp", "none", 8, 0.5, 0, 3))
    finally:
        load_task.cache_clear()
    assert seen == pytest.approx([0.5, 0.25, 0.5 / 3])


def test_numbers_at_the_end_are_recorded_as_final(monkeypatch):
    class Counts(Mlp):
        def at_end(self, model, batch_size, seed):
            return {"sum": float(batch_size + seed)}

    monkeypatch.setitem(tasks.BUILT_IN, "mlp", Counts)
    load_task.cache_clear()
    try:
        result = run(Spec("mlp", "none", 8, 0.5, 2, 3))
    finally:
        load_task.cache_clear()
    assert (result.series["final/sum"].steps, result.series["final/sum"].values) == ([3], [10.0])


def test_all_that_a_claim_asks_for_can_be_asked_for():
    for name in CLAIM_TASKS:
        task = load_task(name).task
        assert isinstance(task, Task)
        assert expand(name, seeds=1)
        assert task.summary[0] not in " ."
