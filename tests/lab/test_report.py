from __future__ import annotations

import dataclasses
import errno
import os
import re
from pathlib import Path

import pytest

from normwise.lab.chart import library
from normwise.lab.claim import judge
from normwise.lab.claims import claims
from normwise.lab.errors import LabError
from normwise.lab.figures import figures
from normwise.lab.report import commands, verdict, write_report
from normwise.lab.score import score
from normwise.lab.spec import expand
from normwise.lab.store import Store
from normwise.lab.sweep import sweep
from normwise.lab.tasks import load_task
from support.made_up_runs import made_up

NORMS = ["none", "batch", "instance"]
TASKS = {name: load_task(name).task for name in ("mlp", "cnn")}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Real runs: two norms, one that is undefined, two batch sizes, a learning rate at which some diverge."""
    specs = expand("mlp", seeds=2, norms=NORMS, batch_sizes=[16, 1], learning_rates=[0.1], steps=6)
    specs += expand("cnn", seeds=2, norms=["none", "batch"], batch_sizes=[4], learning_rates=[0.01, 1e6], steps=4)
    with Store(tmp_path_factory.mktemp("report") / "runs.sqlite") as store:
        sweep(specs, store, jobs=1, finished=lambda *_: None)
        return score(store.runs(spec.key() for spec in specs))


@pytest.fixture(scope="module")
def path(rows, tmp_path_factory):
    judged = [judge(claims()[name], (), 3) for name in ("identity", "invariance", "ics")]
    return write_report(rows, TASKS, tmp_path_factory.mktemp("page") / "report.html", judged=judged)


@pytest.fixture(scope="module")
def page(path):
    return path.read_text(encoding="utf-8")


def test_the_page_is_one_file_that_needs_no_network(page):
    """tests/lab/test_report_in_a_browser.py sees that it asks for nothing; here, that no element could."""
    elements = page.replace(library().strip(), "")
    assert len(elements) < len(page) - 5e5
    assert not re.findall(r"""<[^>]*\s(?:src|href)\s*=\s*["'](?!#)[^"']*""", elements)
    assert not re.findall(r"@import|url\((?!#)", elements)
    assert set(re.findall(r"https?://[^\s\"'&]*", elements)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert len(page) < 6e6


def test_a_page_without_curves_does_not_carry_the_library(rows, tmp_path):
    undefined = [row for row in rows if row.norm == "instance"]
    text = write_report(undefined, {"mlp": TASKS["mlp"]}, tmp_path / "page.html").read_text(encoding="utf-8")
    assert len(text) < 1e5


def test_the_page_has_the_numbers(page, rows):
    for row in rows:
        if row.status == "done":
            assert f"{100 * row.stats['accuracy'].mean:.1f}%" in page
            assert f"{row.stats['train_loss'].mean:.3f}" in page
    assert page.count("undefined: ") >= 3  # instance at both sizes, batch at 1
    assert "one position a channel" in page
    assert "4,000 cases to train on, 1,000 held out" in page


def test_it_opens_on_what_the_runs_are_about(rows, tmp_path):
    """The first tab: a task of the user's own, then claims that runs decided, then tasks; computed claims come last."""

    def tabs(tasks, *names, **runs):
        some = [dataclasses.replace(row, task=name) for name in tasks for row in rows if row.task == "mlp"]
        judged = [judge(claims()[name], runs.get(name, ()), 3) for name in names]
        text = write_report(some, dict.fromkeys(tasks), tmp_path / "page.html", judged=judged).read_text("utf-8")
        return re.findall(r'id="tab-([\w-]+)"', text)[:-1]

    shift = made_up(claims()["ics"], 3, lambda spec, draws: {"shift/gradient/a": [draws.random()]})
    assert tabs(["mine", "mlp"], "identity", "ics") == ["mine", "mlp", "claims"]
    assert tabs(["mlp", "mine"], "identity", "ics", ics=shift) == ["mine", "claims", "mlp"]
    assert tabs(["mlp"], "ics", ics=shift) == ["claims", "mlp"]


def test_claims_come_first_with_verdict_rule_and_source(page):
    assert page.index('id="claims"') < page.index('id="mlp"')
    text = page[page.index('<details class="claim supported" id="claim-invariance">') :]
    assert text.count('class="supported check"') >= 18
    assert "Ba et al. 2016, Table 1" in text
    assert "Without runs here: ics (" in page
    assert 'id="claim-ics"' not in page


def test_every_series_is_drawn(rows):
    titles = [figure.title for figure in figures([row for row in rows if row.task == "mlp"])]
    assert titles == [
        "Training loss",
        "Held-out accuracy",
        "Gap between train mode and eval mode",
        "Saturated units",
        "The input of one nonlinearity",
        "Gradient flow, layer by layer",
        "Gradient flow over the training",
        "Internal covariate shift: the gradient",
        "Internal covariate shift: the inputs",
    ]
    more = [figure.title for figure in figures([row for row in rows if row.task == "cnn"])]
    assert "How much the learning rate matters" in more


def test_curves_are_those_of_the_runs(rows):
    of_cnn = [row for row in rows if row.task == "cnn"]
    (panel,) = next(figure for figure in figures(of_cnn) if figure.title == "Training loss").panels
    assert [line.norm for line in panel.lines] == ["none", "batch"]
    for row, line in zip(of_cnn, panel.lines, strict=True):
        first = [run.series["train/loss"].values[0] for run in row.runs]
        assert (line.y[0], line.low[0], line.high[0]) == pytest.approx((sum(first) / 2, min(first), max(first)))


def test_one_layer_of_the_gradient_figure_is_shown_at_a_time(rows, tmp_path):
    chosen = next(f for f in figures([row for row in rows if row.task == "mlp"]) if f.choices)
    assert chosen.choices == ["linear1", "linear2", "linear3", "linear4"]
    assert [panel.choice for panel in chosen.panels] == [0, 0, 1, 1, 2, 2, 3, 3]  # two batch sizes
    page = "".join(write_report(rows, TASKS, tmp_path / "page.html").read_text(encoding="utf-8").split())
    assert page.count('class="panelother"') == sum(
        chart.panel.choice > 0
        for task in TASKS
        for figure in figures([row for row in rows if row.task == task])
        for chart in figure.charts
    )


def test_commands_repeat_the_runs(rows):
    found = {(row.norm, row.batch_size, rate): command for row, rate, command in commands(rows)}
    assert found["batch", 4, 0.01] == (
        "normwise compare cnn --norms batch --batch-sizes 4 --lr 0.01 --steps 4 --seeds 2 --out again"
    )
    assert ("batch", 4, 1e6) in found
    for row, rate, command in commands(rows):
        words = command.split()
        given = dict(zip(words[3::2], words[4::2], strict=True))
        specs = expand(
            words[2],
            seeds=int(given["--seeds"]),
            norms=[given["--norms"]],
            batch_sizes=[int(given["--batch-sizes"])],
            learning_rates=[float(given["--lr"])],
            steps=int(given["--steps"]),
        )
        if rate == row.learning_rate:
            assert {spec.key() for spec in specs} == {run.key for run in row.runs}


def test_a_page_that_cannot_be_written_is_named_and_the_old_one_stays(rows, tmp_path, monkeypatch):
    path = tmp_path / "page.html"
    path.write_text("old")

    def full(self, *_, **__):
        self.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(LabError, match=r"page.html cannot be written \(No space left"):
            write_report(rows, TASKS, path)
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]


def test_a_page_of_undefined_norms_alone_says_so(rows, tmp_path):
    undefined = [row for row in rows if row.norm == "instance"]
    text = write_report(undefined, {"mlp": TASKS["mlp"]}, tmp_path / "page.html").read_text(encoding="utf-8")
    assert "no norm finished" in text
    assert "What is claimed" not in text


def test_names_are_escaped(rows, tmp_path):
    class Odd(type(TASKS["mlp"])):
        summary = "<script>alert(1)</script>"

    odd = [dataclasses.replace(row, norm='<b a="1">') if row.norm == "batch" else row for row in rows]
    text = write_report(odd, {"mlp": Odd()}, tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert" in text
    assert "<b a=" not in text


def test_a_task_whose_code_is_not_at_hand_is_drawn_all_the_same(rows, tmp_path):
    renamed = [dataclasses.replace(row, task="mine") for row in rows if row.task == "cnn"]
    text = write_report(renamed, {"mine": None}, tmp_path / "page.html").read_text(encoding="utf-8")
    assert '<section id="mine"' in text
    assert text.count("<svg") >= 8
    assert "normwise compare --task FILE.py:" in text
    write_report(renamed, {"mine": None}, tmp_path / "page.html", references={"mine": "my tasks/net.py:make"})
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "normwise compare --task &#39;my tasks/net.py:make&#39; --norms" in text
    assert "FILE.py:" not in text


def test_verdicts(rows):
    best, tied = (dict(zip(NORMS[:2], marks, strict=True)) for marks in (("", "best"), ("tied", "tied")))
    done = [row for row in rows if row.task == "mlp" and row.batch_size == 16 and row.status == "done"]

    def marked(marks):
        return [dataclasses.replace(row, mark=marks[row.norm]) for row in done]

    assert re.fullmatch(r"batch \d+\.\d% is best\.", verdict(marked(best)))
    assert re.fullmatch(r"all that finished tie \(.*\)\.", verdict(marked(tied)))
    assert verdict(marked({"none": "", "batch": ""})).startswith("one seed or one norm")
    assert verdict([row for row in rows if row.status == "undefined"]) == "no norm finished."
