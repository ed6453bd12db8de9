from __future__ import annotations

import dataclasses
import json
import re

import pytest
from plotly.offline import get_plotlyjs

from normwise.lab.figures import COLOURS, figures
from normwise.lab.report import verdict, write_report
from normwise.lab.score import score
from normwise.lab.spec import expand
from normwise.lab.store import Store
from normwise.lab.sweep import sweep
from normwise.lab.tasks import load_task

NORMS = ["none", "batch", "instance"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Real runs: two norms, one that is undefined, two batch sizes, a learning rate at which some diverge."""
    specs = expand("mlp", seeds=2, norms=NORMS, batch_sizes=[16, 1], learning_rates=[0.1], steps=6)
    specs += expand("cnn", seeds=2, norms=["none", "batch"], batch_sizes=[4], learning_rates=[0.01, 1e6], steps=4)
    with Store(tmp_path_factory.mktemp("report") / "runs.sqlite") as store:
        sweep(specs, store, jobs=1, finished=lambda *_: None)
        return score(store.runs(spec.key() for spec in specs))


@pytest.fixture(scope="module")
def page(rows, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    return write_report(rows, [load_task("mlp").task, load_task("cnn").task], path).read_text(encoding="utf-8")


def test_the_page_needs_no_network(page):
    page = page.replace(get_plotlyjs(), "")
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!#)[^"']*""", page)
    assert "@import" not in page
    assert "url(" not in page


def test_the_page_has_the_numbers(page, rows):
    for row in rows:
        if row.status == "done":
            assert f"{100 * row.stats['accuracy'].mean:.1f}%" in page
            assert f"{row.stats['train_loss'].mean:.3f}" in page
    assert page.count("undefined: ") >= 3  # instance at both sizes, batch at 1
    assert "one position a channel" in page
    assert "4,000 cases to train on, 1,000 held out" in page


def test_the_page_s_figures_are_plotly_s(page):
    figures_of_page = re.findall(r'<script type="application/json" data-for="(.*?)">(.*?)</script>', page, re.DOTALL)
    assert len(figures_of_page) >= 14
    for name, text in figures_of_page:
        figure = json.loads(text)
        assert figure["data"]
        assert f'id="{name}"' in page


def test_every_series_is_drawn(rows):
    titles = [figure.title for figure in figures([row for row in rows if row.task == "mlp"])]
    assert titles == [
        "Training loss",
        "Held-out accuracy",
        "Training accuracy",
        "Gap between train mode and eval mode",
        "Gradient norm, layer by layer",
        "Gradient norm over the training",
        "Saturated units",
        "The input of one nonlinearity",
        "Time per step",
    ]
    more = [figure.title for figure in figures([row for row in rows if row.task == "cnn"])]
    assert "How much the learning rate matters" in more


def test_curves_are_those_of_the_runs(rows):
    of_cnn = [row for row in rows if row.task == "cnn"]
    loss = next(figure for figure in figures(of_cnn) if figure.title == "Training loss").plot
    for row in of_cnn:
        line = next(t for t in loss.data if t.line.color == COLOURS[row.norm] and t.mode == "lines" and not t.fill)
        first = [run.series["train/loss"].values[0] for run in row.runs]
        assert line.y[0] == pytest.approx(sum(first) / 2)


def test_one_layer_of_the_gradient_figure_is_shown_at_a_time(rows):
    chosen = next(f for f in figures([row for row in rows if row.task == "mlp"]) if f.choices)
    assert chosen.choices == ("linear1", "linear2", "linear3", "linear4")
    of_layers = [trace for trace in chosen.plot.data if trace.meta is not None]
    assert {trace.meta for trace in of_layers} == {0, 1, 2, 3}
    assert all(trace.visible == (trace.meta == 0) for trace in of_layers)


def test_a_page_of_undefined_norms_alone_says_so(rows, tmp_path):
    undefined = [row for row in rows if row.norm == "instance"]
    text = write_report(undefined, [load_task("mlp").task], tmp_path / "page.html").read_text(encoding="utf-8")
    assert "no norm finished" in text


def test_names_are_escaped(rows, tmp_path):
    class Odd(type(load_task("mlp").task)):
        summary = "<script>alert(1)</script>"

    text = write_report(rows, [Odd()], tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert" in text


def test_verdicts(rows):
    best, tied = (dict(zip(NORMS[:2], marks, strict=True)) for marks in (("", "best"), ("tied", "tied")))
    done = [row for row in rows if row.task == "mlp" and row.batch_size == 16 and row.status == "done"]

    def marked(marks):
        return [dataclasses.replace(row, mark=marks[row.norm]) for row in done]

    assert re.fullmatch(r"batch \d+\.\d% is best\.", verdict(marked(best)))
    assert re.fullmatch(r"all that finished tie \(.*\)\.", verdict(marked(tied)))
    assert verdict(marked({"none": "", "batch": ""})).startswith("one seed or one norm")
    assert verdict([row for row in rows if row.status == "undefined"]) == "no norm finished."
