"""Curves over time steps and parts of the held-out cases: from stored runs into the page."""

from __future__ import annotations

import pytest

from normwise.lab.figures_over_time import over_time
from normwise.lab.report import write_report
from normwise.lab.score import as_json, parts_of, score
from normwise.lab.spec import expand
from normwise.lab.store import Store
from normwise.lab.sweep import sweep
from normwise.lab.tasks import load_task


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    specs = expand("rnn", seeds=2, norms=["none", "batch-per-step"], batch_sizes=[8, 1], learning_rates=[0.01], steps=2)
    specs += expand("mlp", seeds=1, norms=["none"], batch_sizes=[4], learning_rates=[0.01], steps=1)
    with Store(tmp_path_factory.mktemp("over-time") / "runs.sqlite") as store:
        sweep(specs, store, jobs=1, finished=lambda *_: None)
        return score(store.runs(spec.key() for spec in specs))


def test_parts_are_scored(rows):
    of_rnn, of_mlp = ([row for row in rows if row.task == task] for task in ("rnn", "mlp"))
    assert parts_of(of_rnn) == ["longer", "longer-cut"]
    assert parts_of(of_mlp) == []
    row = of_rnn[0]
    finals = [run.series["final/longer/accuracy"].values[-1] for run in row.runs]
    assert row.stats["accuracy/longer"].values == tuple(finals)
    assert as_json([row])[0]["accuracy/longer"]["mean"] == pytest.approx(sum(finals) / 2)


def test_a_panel_has_the_stored_curves_and_shades_what_lies_beyond_training(rows):
    of_rnn = [row for row in rows if row.task == "rnn"]
    drawn = over_time(of_rnn)
    assert [figure.title for figure in drawn] == [
        "Size of the summed inputs over the time steps",
        "Size of the summed inputs before any norm",
        "Gradient norm over the time steps",
    ]
    plain = of_rnn[0]
    stored = [run.series["over-time/summed/eval/end"].values for run in plain.runs]
    means = [sum(pair) / 2 for pair in zip(*stored, strict=True)]
    panels = drawn[0].panels
    # batch-per-step is undefined at batch size 1
    assert [panel.title for panel in panels] == [
        "none, batch size 8",
        "batch-per-step, batch size 8",
        "none, batch size 1",
    ]
    (thick,) = [line for line in panels[0].lines if line.style == "main"]
    assert list(thick.y) == pytest.approx(means)
    assert thick.x[0] == 1  # people count steps from 1
    assert {panel.shaded_from for panel in panels} == {16.5}
    assert [chart.fields["$shade"][0]["from"] for chart in drawn[0].charts] == [16.5] * 3


def test_a_task_without_sequences_has_none(rows):
    assert over_time([row for row in rows if row.task == "mlp"]) == []


def test_the_page_has_the_figures_and_the_parts(rows, tmp_path):
    tasks = {name: load_task(name).task for name in ("rnn", "mlp")}
    page = write_report(rows, tasks, tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("Gradient norm over the time steps") == 1
    assert page.count("<th>accuracy, longer</th>") == 1
    longer = next(row for row in rows if row.task == "rnn").stats["accuracy/longer"]
    assert f"{100 * longer.mean:.1f}%" in page
