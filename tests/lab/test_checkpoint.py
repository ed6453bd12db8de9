from __future__ import annotations

import dataclasses
import time
from itertools import pairwise

import pytest
import torch

from normwise.lab import checkpoint, watch
from normwise.lab import run as module
from normwise.lab.errors import LabError
from normwise.lab.run import run
from normwise.lab.spec import Spec, expand
from normwise.lab.store import Store
from normwise.lab.sweep import sweep

SPEC = Spec("mlp", "batch", 16, 0.05, seed=0, steps=40)


def numbers(result):
    return {name: (series.steps, series.values) for name, series in result.series.items() if name != "time/step"}


def stopped_after(spec, kept, steps, monkeypatch):
    """What Ctrl-C does in mid-run, with a checkpoint after every update."""
    monkeypatch.setattr(checkpoint, "SECONDS", 0)
    with monkeypatch.context() as patch:
        count, accuracy = iter(range(10**6)), watch.accuracy

        def interrupting(scores, targets):
            if len(scores) == spec.batch_size and next(count) == steps:
                raise KeyboardInterrupt
            return accuracy(scores, targets)

        patch.setattr(module.watch, "accuracy", interrupting)
        with pytest.raises(KeyboardInterrupt):
            run(spec, kept)


@pytest.mark.parametrize(
    "spec",
    [
        SPEC,
        dataclasses.replace(SPEC, task="cnn", norm="layer", steps=9),
        dataclasses.replace(SPEC, task="lstm", norm="batch-per-step", learning_rate=0.01, steps=9),
    ],
    ids=lambda spec: spec.task,
)
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(spec, tmp_path, monkeypatch):
    whole, kept = run(spec), tmp_path / "of" / "run.pt"
    for steps in (5, 2, 0):  # stopped three times
        stopped_after(spec, kept, steps, monkeypatch)
        torch.manual_seed(99)
    assert numbers(run(spec, kept)) == numbers(whole)


def test_a_checkpoint_that_was_cut_is_named_and_stays(tmp_path, monkeypatch):
    kept = tmp_path / "run.pt"
    stopped_after(SPEC, kept, 3, monkeypatch)
    for content in (kept.read_bytes()[:1000], b"", b"rubbish"):
        kept.write_bytes(content)
        with pytest.raises(LabError, match=r"run\.pt is damaged .*Delete it, and the run starts from its beginning"):
            run(SPEC, kept)
        assert kept.read_bytes() == content


def test_a_checkpoint_that_cannot_be_written_is_an_error_and_the_last_one_stays(tmp_path, monkeypatch):
    kept = tmp_path / "run.pt"
    stopped_after(SPEC, kept, 3, monkeypatch)
    before = kept.read_bytes()

    def full(state, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(LabError, match=r"cannot be written .*No space left on device.*Free some space"):
        run(SPEC, kept)
    assert kept.read_bytes() == before
    assert list(tmp_path.iterdir()) == [kept]


def test_a_sweep_deletes_the_checkpoints_of_what_it_has_stored(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SECONDS", 0)
    specs, folder = (
        expand("mlp", seeds=2, norms=["layer"], batch_sizes=[8], learning_rates=[0.1], steps=3),
        tmp_path / "kept",
    )
    seen = []
    with Store(tmp_path / "runs.sqlite") as store:
        sweep(specs, store, jobs=1, checkpoints=folder, finished=lambda *_: seen.append(len(list(folder.iterdir()))))
    assert seen == [0, 0]


def test_long_runs_keep_means_over_as_many_steps_as_keep_the_series_short(monkeypatch):
    every, short = run(SPEC), dataclasses.replace(SPEC, steps=40)
    monkeypatch.setattr(module, "TRAIN_POINTS", 6)
    series = run(short).series["train/loss"]
    assert series.steps == [6, 13, 20, 27, 34, 39]
    losses = every.series["train/loss"].values
    assert series.values == pytest.approx(
        [sum(part) / len(part) for i in range(0, 40, 7) if (part := losses[i : i + 7])]
    )


def test_a_checkpoint_is_written_about_as_often_as_it_says(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(checkpoint, "save", lambda path, step, *_: written.append(step))
    clock = iter(range(0, 10**6, 10))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    run(SPEC, tmp_path / "run.pt")
    assert written
    assert all(5 > b - a > 1 for a, b in pairwise(written))
