from __future__ import annotations

import json
import math

import pytest

from normwise.lab.score import as_json, band, score, tie, training_loss
from normwise.lab.store import Curve, Run
from normwise.lab.strict_json import to_json


def a_run(norm="batch", seed=0, *, rate=0.1, size=8, accuracy=0.9, loss=0.5, status="done", reason="", task="mlp"):
    identity = {"task": task, "norm": norm, "batch_size": size, "learning_rate": rate, "seed": seed, "steps": 20}
    series = {
        "train/loss": Curve(list(range(20)), [3.0] * 18 + [loss, loss]),
        "time/step": Curve(list(range(20)), [0.001] * 19 + [1.0]),
        "gradient/first": Curve([0, 10], [1.0, 3.0]),
        "gradient/last": Curve([0, 10], [5.0, 5.0]),
        "heldout/gap": Curve([0, 20], [0.5, 0.25]),
        "final/accuracy": Curve([20], [accuracy]),
        "final/loss": Curve([20], [0.7]),
    }
    return Run("key", identity, status, reason, "machine", series if status == "done" else {})


def runs_of(norm, accuracies, **others):
    return [a_run(norm, seed, accuracy=accuracy, **others) for seed, accuracy in enumerate(accuracies)]


def marks(runs):
    return {row.norm: row.mark for row in score(runs)}


def test_quantities_of_a_row():
    (row,) = score(runs_of("batch", [0.8, 0.9, 1.0]))
    assert row.stats["accuracy"].mean == pytest.approx(0.9)
    assert row.stats["accuracy"].spread == pytest.approx(0.1)
    assert row.stats["train_loss"].values == (0.5, 0.5, 0.5)  # the last tenth alone
    assert row.stats["ms_per_step"].mean == 1  # the median: one slow step does not count
    assert row.stats["first_gradient"].mean == 2
    assert row.stats["gap"].mean == 0.25
    assert "saturated" not in row.stats
    assert row.seeds == (0, 1, 2)


def test_the_training_loss_chooses_the_learning_rate_and_held_out_accuracy_has_no_say():
    low = runs_of("batch", [0.99, 0.99], rate=0.01, loss=0.6)
    best = runs_of("batch", [0.5, 0.5], rate=0.1, loss=0.4)
    high = runs_of("batch", [0.99, 0.99], rate=1.0, loss=0.5)
    (row,) = score(low + best + high)
    assert (row.learning_rate, row.at_edge) == (0.1, "")
    assert row.stats["accuracy"].mean == 0.5
    assert {rate: stat.mean for rate, stat in row.offered.items()} == {0.01: 0.6, 0.1: 0.4, 1.0: 0.5}


@pytest.mark.parametrize(("losses", "edge"), [((0.1, 0.2, 0.3), "lowest"), ((0.3, 0.2, 0.1), "highest")])
def test_a_rate_at_the_end_of_the_grid_is_told(losses, edge):
    rates = zip((0.01, 0.1, 1.0), losses, strict=True)
    (row,) = score([a_run(rate=rate, loss=loss) for rate, loss in rates])
    assert row.at_edge == edge


def test_of_two_rates_each_is_an_end_and_nothing_is_told():
    (row,) = score([a_run(rate=0.1, loss=0.2), a_run(rate=1.0, loss=0.4)])
    assert row.at_edge == ""


def test_a_rate_at_which_one_seed_diverges_is_not_taken():
    sound = runs_of("batch", [0.5, 0.5], rate=0.1, loss=2.0)
    lost = [a_run(rate=1.0, loss=0.1), a_run(seed=1, rate=1.0, status="diverged", reason="inf at step 3")]
    (row,) = score(sound + lost)
    assert (row.status, row.learning_rate) == ("done", 0.1)
    assert row.offered[1.0].mean == math.inf
    (row,) = score(lost)
    assert (row.status, row.reason) == ("diverged", "1 of 2 seeds at the best rate: inf at step 3")
    written = json.loads(to_json(as_json([row])))
    assert written[0]["training_loss_by_learning_rate"] == [{"learning_rate": 1.0, "values": [0.1, None]}]


def test_an_undefined_norm_is_a_row_with_its_reason():
    rows = score([a_run("instance", seed, status="undefined", reason="one value") for seed in (0, 1)])
    assert [(row.status, row.reason, row.mark, row.stats) for row in rows] == [("undefined", "one value", "", {})]


def test_best_and_tied():
    clear = runs_of("batch", [0.90, 0.91, 0.92]) + runs_of("none", [0.10, 0.11, 0.13])
    assert marks(clear) == {"batch": "best", "none": ""}
    close = clear + runs_of("layer", [0.905, 0.90, 0.925])
    assert marks(close) == {"batch": "tied", "none": "", "layer": "tied"}


def test_pairing_by_seed_tells_apart_what_the_spread_alone_would_not():
    # Seeds differ by far more than norms do, but on every seed batch is ahead by the same 0.02.
    batch = runs_of("batch", [0.50, 0.70, 0.90])
    layer = runs_of("layer", [0.479, 0.68, 0.881])
    assert marks(batch + layer) == {"batch": "best", "layer": ""}
    shuffled = [a_run("layer", seed, accuracy=a) for seed, a in ((0, 0.881), (1, 0.479), (2, 0.68))]
    assert marks(batch + shuffled) == {"batch": "tied", "layer": "tied"}


def test_one_seed_marks_nothing():
    assert marks(runs_of("batch", [0.9]) + runs_of("none", [0.1])) == {"batch": "", "none": ""}


def test_marks_stay_within_a_task_and_a_batch_size():
    runs = [
        run
        for task in ("mlp", "cnn")
        for size in (8, 2)
        for norm, accuracy in (("batch", 0.9), ("none", 0.1 * size))
        for run in runs_of(norm, [accuracy, accuracy + 0.001], size=size, task=task)
    ]
    rows = score(runs)
    assert [(row.task, row.batch_size) for row in rows] == [
        (task, size) for task in ("mlp", "cnn") for size in (8, 8, 2, 2)
    ]
    assert all(row.mark == ("best" if row.norm == "batch" else "") for row in rows)


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ([0.1], True),
        ([0.0, 0.0, 0.0], True),
        ([0.1, 0.1, 0.1], False),
        # mean 0.02, half-width 4.303 * 0.01 / sqrt(3) = 0.0248
        ([0.01, 0.02, 0.03], True),
        # mean 0.03, the same half-width
        ([0.02, 0.03, 0.04], False),
        ([-0.02, -0.03, -0.04], False),
    ],
)
def test_a_tie_is_an_interval_that_contains_0(differences, expected):
    assert tie(differences) is expected


def test_training_loss_of_a_short_run_is_its_last_step():
    run = a_run()
    run.series["train/loss"] = Curve([0, 1], [3.0, 1.0])
    assert training_loss(run) == 1


def test_a_band_is_the_mean_and_range_of_the_runs_by_bins():
    one, other = a_run(), a_run()
    one.series["x"] = Curve([0, 1, 2, 3], [0.0, 2.0, 4.0, 6.0])
    other.series["x"] = Curve([0, 1], [2.0, 4.0])  # ended early
    result = band([one, other], "x", bins=2)
    assert (result.mean, result.low, result.high) == ([2.0, 5.0], [1.0, 5.0], [3.0, 5.0])
    assert band([one], "missing") is None
    assert band([one], "x").mean == [0, 2, 4, 6]


def test_on_text_the_fewest_bits_per_character_are_best():
    def of_text(norm, bits, accuracies):
        runs = runs_of(norm, accuracies)
        for run, value in zip(runs, bits, strict=True):
            run.series["final/bits-per-character"] = Curve([20], [value])
        return runs

    rows = score(
        of_text("layer", [2.0, 2.1, 2.05], [0.5, 0.5, 0.5]) + of_text("none", [2.5, 2.6, 2.55], [0.6, 0.6, 0.6])
    )
    assert {row.norm: (row.criterion, row.mark) for row in rows} == {
        "layer": ("bits_per_character", "best"),
        "none": ("bits_per_character", ""),
    }
    assert as_json(rows)[0]["bits_per_character"]["mean"] == pytest.approx(2.05)
    assert score(runs_of("batch", [0.8]))[0].criterion == "accuracy"
