from __future__ import annotations

import dataclasses
import math
import re
import runpy
from pathlib import Path

import pytest
import torch
from torch import nn

from normwise import measure
from normwise.lab import spec as spec_module
from normwise.lab import watch
from normwise.lab.errors import LabError
from normwise.lab.run import run
from normwise.lab.spec import Spec, expand
from normwise.lab.tasks import LoadedTask, Task, load_task
from normwise.lab.tasks.mlp import Mlp

SPEC = Spec("mlp", "batch", 16, 0.05, seed=0, steps=12)


def numbers(result):
    return {name: (s.steps, s.values) for name, s in result.series.items() if name != "time/step"}


@pytest.mark.parametrize("spec", [SPEC, dataclasses.replace(SPEC, task="cnn", norm="group", steps=3)])
def test_a_spec_gives_the_same_numbers_twice_and_other_numbers_for_another_seed(spec):
    first = run(spec)
    torch.manual_seed(99)  # the state that a run finds has no say
    assert numbers(run(spec)) == numbers(first)
    assert first.status == "done"
    assert numbers(run(dataclasses.replace(spec, seed=1))) != numbers(first)


def test_series_of_a_run():
    series = run(SPEC).series
    for name in ("train/loss", "train/accuracy", "time/step"):
        assert series[name].steps == list(range(12))
    for mode in ("train", "eval"):
        for name in ("loss", "accuracy"):
            assert series[f"heldout/{mode}/{name}"].steps[0] == 0
            assert series[f"heldout/{mode}/{name}"].steps[-1] == 12
    assert [name for name in series if name.startswith("gradient/")] == [
        f"gradient/linear{layer}.weight" for layer in (1, 2, 3, 4)
    ]
    assert series["final/accuracy"].steps == [12]
    low, middle, high = (series[f"preactivation/p{p}"].values for p in (15, 50, 85))
    assert all(a < b < c for a, b, c in zip(low, middle, high, strict=True))
    assert series["heldout/gap"].values[0] > 0.01  # running statistics of 0 and 1 are not those of the batch
    assert max(series["saturated"].values) <= 1
    assert all(value > 0 for value in series["time/step"].values)


def test_training_learns():
    result = run(dataclasses.replace(SPEC, steps=150, batch_size=64))
    assert result.series["final/accuracy"].values[-1] > 0.8


@pytest.mark.parametrize("norm", ["layer", "group", "rms", "none"])
def test_norms_that_do_not_look_at_the_batch_have_no_gap(norm):
    series = run(dataclasses.replace(SPEC, norm=norm, steps=2)).series
    assert max(series["heldout/gap"].values) < 1e-6


def test_batch_of_one_is_undefined_for_batch_norm_and_defined_for_layer_norm():
    alone = dataclasses.replace(SPEC, batch_size=1, steps=2)
    result = run(alone)
    assert (result.status, result.series) == ("undefined", {})
    assert result.reason.startswith("Expected more than 1 value per channel")
    assert run(dataclasses.replace(alone, norm="layer")).status == "done"
    assert run(dataclasses.replace(alone, task="cnn")).status == "done"  # 14 x 14 values a channel


def test_instance_norm_is_undefined_on_vectors():
    result = run(dataclasses.replace(SPEC, norm="instance"))
    assert result.status == "undefined"
    assert "one position a channel" in result.reason


def test_a_loss_that_is_not_finite_ends_the_run():
    result = run(dataclasses.replace(SPEC, task="cnn", norm="none", learning_rate=1e6))
    assert result.status == "diverged"
    assert "the training loss became" in result.reason
    assert all(map(math.isfinite, result.series["train/loss"].values))
    assert "final/accuracy" not in result.series


class Broken(Task):
    name, summary = "broken", ""

    def data(self):
        return load_task("mlp").task.data()

    def model(self, norm, seed):
        raise ValueError("something else is wrong")


def test_a_fault_in_a_task_is_not_taken_for_an_undefined_norm(monkeypatch):
    monkeypatch.setattr("normwise.lab.run.load_task", lambda _: LoadedTask(Broken(), ""))
    with pytest.raises(ValueError, match="something else is wrong"):
        run(SPEC)


def test_the_probe_leaves_the_model_and_the_random_state_as_they_were():
    task = load_task("mlp").task
    model = task.model("batch", 0).train()
    model.add_module("dropout", nn.Dropout(0.5))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    watch.Probe(task, 16).look(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_activity_counts_what_is_flat():
    class Flat(Mlp):
        watched = "0"

    model = nn.Sequential(nn.Sigmoid())
    with watch.activity(model, Flat()) as seen:
        model(torch.tensor([[-7.0, 0.0, 6.5, 5.9], [1.0, 2.0, 3.0, -6.1]]))
    series = seen.series()
    assert series["saturated"] == 3 / 8
    assert series["preactivation/p50"] == pytest.approx(-3.0)  # of channel 0: -7 and 1


def test_a_watched_module_that_is_not_there_is_named():
    task = load_task("mlp").task
    with pytest.raises(LabError, match="watches 'sigmoid3', which is no module"), watch.activity(nn.ReLU(), task):
        pass


def test_gradient_norms_are_of_the_weights_alone():
    task = load_task("cnn").task
    model = task.model("layer", 0)
    weights = watch.weights(model)
    assert [name for name in weights if "norm" in name] == []
    model(task.cases[0].inputs[:4]).square().sum().backward()
    found = watch.gradient_norms(weights)
    expected = model.conv.weight.grad.double().square().sum().sqrt().item()
    assert found["gradient/conv.weight"] == pytest.approx(expected, rel=1e-5)


def test_expand_gives_every_combination_once():
    specs = expand("mlp", seeds=2, norms=["none", "batch", "none"], batch_sizes=[8], learning_rates=[0.1], steps=5)
    assert [(s.norm, s.seed) for s in specs] == [("none", 0), ("none", 1), ("batch", 0), ("batch", 1)]
    task = load_task("cnn").task
    combinations = len(task.norms) * len(task.batch_sizes) * len(task.learning_rates) * 3
    assert len(expand("cnn", seeds=3)) == combinations


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"norms": ["lyer"]}, r"unknown norm 'lyer' for task 'mlp'; did you mean layer"),
        ({"batch_sizes": [4001]}, r"batch size 4001 is not in 1\.\.4000"),
        ({"learning_rates": [-1.0]}, "learning rate -1.0 is not a positive"),
        ({"learning_rates": [math.nan]}, "learning rate nan is not a positive"),
        ({"steps": 0}, "steps is 0"),
        ({"seeds": 0}, "seeds is 0"),
        ({"norms": []}, "nothing to run"),
    ],
)
def test_expand_names_what_it_cannot_take(arguments, message):
    with pytest.raises(LabError, match=message):
        expand("mlp", **({"seeds": 1} | arguments))


def test_the_key_depends_on_everything_that_determines_a_run(monkeypatch):
    key = SPEC.key()
    assert SPEC.key() == key
    changes = {"norm": "layer", "batch_size": 8, "learning_rate": 0.1, "seed": 1, "steps": 13, "task": "cnn"}
    keys = {dataclasses.replace(SPEC, **{name: value}).key() for name, value in changes.items()}
    for name, value in {"torch.__version__": "0", "normwise.__version__": "0"}.items():
        with monkeypatch.context() as patch:
            patch.setattr(f"normwise.lab.spec.{name}", value)
            keys.add(SPEC.key())
    with monkeypatch.context() as patch:
        patch.setattr("normwise.lab.spec.LAB_REVISION", 0)
        keys.add(SPEC.key())
    with monkeypatch.context() as patch:
        patch.setenv("NORMWISE_BACKEND", "reference")
        keys.add(SPEC.key())
    assert len(keys - {key}) == len(changes) + 4


def test_every_file_of_the_lab_that_computes_a_run_is_part_of_its_key():
    """What run.py imports within the lab, directly or not; a task's own files are hashed with the task."""
    lab, seen, stack = Path(spec_module.__file__).parent, set(), ["run.py"]
    while stack:
        name = stack.pop()
        if name in seen:
            continue
        seen.add(name)
        for module in re.findall(r"^from normwise\.lab\.([\w.]+) import", (lab / name).read_text(), re.MULTILINE):
            path = module.replace(".", "/")
            stack.append(f"{path}.py" if (lab / f"{path}.py").exists() else f"{path}/__init__.py")
        for names in re.findall(r"^from normwise\.lab import ([\w, ]+)$", (lab / name).read_text(), re.MULTILINE):
            stack += [f"{module.strip()}.py" for module in names.split(",")]
    of_tasks = {name for name in seen if name.startswith("tasks/") and name != "tasks/base.py"}
    # These carry values from here to there and put in none of their own.
    carriers = {"spec.py", "errors.py", "checkpoint.py", "user_file.py", "strict_json.py"}
    assert seen - of_tasks - carriers == set(spec_module.COMPUTES)


def test_every_file_that_measures_a_run_is_part_of_its_key():
    """What the lab imports from `normwise.measure`, directly or not."""
    lab, folder = Path(spec_module.__file__).parent, Path(measure.__file__).parent
    seen, stack = set(), list(lab.rglob("*.py"))
    while stack:
        for name in re.findall(r"^from normwise\.measure\.(\w+) import", stack.pop().read_text(), re.MULTILINE):
            if name not in seen:
                seen.add(name)
                stack.append(folder / f"{name}.py")
    assert {f"{name}.py" for name in seen} == set(spec_module.MEASURES)


def test_a_changed_measure_changes_the_key(monkeypatch):
    def revision():
        return runpy.run_path(spec_module.__file__)["LAB_REVISION"]

    assert revision() == spec_module.LAB_REVISION
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda p: read(p) + (b"#" if p.parent.name == "measure" else b""))
    assert revision() != spec_module.LAB_REVISION


def test_the_key_follows_a_user_s_file_and_not_its_place(tmp_path):
    text = "from normwise.lab.tasks.mlp import Mlp\nclass Mine(Mlp):\n    name = 'mine'\nmake = Mine\n"
    keys = []
    for folder, content in (("a", text), ("b", text), ("c", text + "# changed\n")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text(content)
        keys.append(dataclasses.replace(SPEC, task=f"{tmp_path / folder / 'mine.py'}:make").key())
    assert keys[0] == keys[1] != keys[2]
