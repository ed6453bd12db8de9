from __future__ import annotations

import re
from html import unescape

import pytest

from normwise.lab.report import commands
from normwise.lab.spec import expand
from normwise.lab.store import Store
from normwise.lab.study import study
from normwise.lab.sweep import sweep

SMALL = ("--norms", "none,layer", "--batch-sizes", "16", "--seeds", "1", "--lr", "0.1", "--steps", "3", "--jobs", "1")


@pytest.fixture
def folder(normwise_command, tmp_path):
    assert normwise_command("compare", "mlp", *SMALL, "--out", str(tmp_path)).status == 0
    (tmp_path / "report.html").unlink()
    return tmp_path


def test_a_store_becomes_a_page(normwise_command, folder):
    status, out, err = normwise_command("report", "--out", str(folder))
    assert (status, err) == (0, "")
    assert re.fullmatch(rf"Report: {re.escape(str(folder / 'report.html'))} \(1\.\d MB\)\n", out)
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert 'id="claim-invariance"' in text
    assert '<section id="mlp"' in text


def test_its_figures_become_pictures_without_a_browser(normwise_command, folder, monkeypatch):
    monkeypatch.setenv("PATH", "")
    status, out, _ = normwise_command("report", "--out", str(folder), "--png", str(folder / "png"))
    assert status == 0
    assert f"in {folder / 'png'}" in out
    names = {path.name for path in (folder / "png").iterdir()}
    assert {"mlp-training-loss.png", "mlp-held-out-accuracy-by-norm-and-batch-size.png"} <= names
    assert f"Figures: {len(names)} in" in out


def test_no_store_is_an_error_and_makes_nothing(normwise_command, tmp_path):
    status, out, err = normwise_command("report", "--out", str(tmp_path / "nowhere"))
    assert (status, out) == (2, "")
    assert "no such store" in err
    assert not (tmp_path / "nowhere").exists()


def test_one_task_gets_a_page_of_its_own_with_all_its_figures(normwise_command, folder):
    assert normwise_command("compare", "mlp-bad-start", *SMALL, "--out", str(folder)).status == 0
    (folder / "report.html").write_text("as it was")
    status, out, err = normwise_command("report", "--task", "mlp-bad-start", "--out", str(folder))
    page = folder / "report-mlp-bad-start.html"
    assert (status, err) == (0, "")
    assert out.startswith(f"Report: {page} (")
    text = page.read_text(encoding="utf-8")
    assert re.findall(r'id="tab-([\w-]+)"', text) == ["mlp-bad-start", "rules"]
    assert "Gradient flow, layer by layer" in text
    assert (folder / "report.html").read_text() == "as it was"
    assert normwise_command("report", "--task", "mlp", "--task", "mlp-bad-start", "--out", str(folder)).status == 0
    text = (folder / "report-mlp-mlp-bad-start.html").read_text(encoding="utf-8")
    assert re.findall(r'id="tab-([\w-]+)"', text) == ["mlp", "mlp-bad-start", "rules"]


def test_a_task_that_the_store_lacks_is_named_with_those_that_it_has(normwise_command, folder):
    status, _, err = normwise_command("report", "--task", "cnn", "--out", str(folder))
    assert status == 2
    assert "'cnn'" in err
    assert "mlp" in err
    assert not (folder / "report-cnn.html").exists()


TASK = """
from normwise.lab.tasks.mlp import Mlp

class Mine(Mlp):
    name = "mine"

def make():
    return Mine()
"""


def commands_of(folder):
    """Those on the page."""
    return [
        unescape(text) for text in re.findall(r"normwise compare [^<]*", (folder / "report.html").read_text("utf-8"))
    ]


def stored_commands(folder):
    """Those that `normwise report` would write, without the time that a page takes."""
    with Store(folder / "runs.sqlite") as store:
        found = study(store)
    return [command for _, _, command in commands(found.rows, found.references["mine"])]


def test_its_commands_name_the_users_file_and_say_where_it_has_changed(normwise_command, tmp_path):
    file = tmp_path / "my task.py"
    file.write_text(TASK)
    assert normwise_command("compare", "--task", f"{file}:make", *SMALL, "--out", str(tmp_path)).status == 0
    by_compare = commands_of(tmp_path)
    assert all(f"--task '{file}:make' --norms" in command for command in by_compare)
    assert stored_commands(tmp_path) == by_compare
    file.write_text(TASK.replace('"mine"', '"mine"  # edited'))
    assert normwise_command("report", "--out", str(tmp_path)).status == 0
    edited = "  # the file, or a module of its own, has been edited since: this trains what it is now"
    assert commands_of(tmp_path) == [command + edited for command in by_compare]
    moved = file.rename(tmp_path / "moved.py")
    assert all("--out again  # the file is not there any more" in command for command in stored_commands(tmp_path))
    moved.write_text(TASK)
    same = {"norms": ["none", "layer"], "batch_sizes": [16], "learning_rates": [0.1], "steps": 3}
    with Store(tmp_path / "runs.sqlite") as store:
        sweep(expand(f"{moved}:make", seeds=1, **same), store, jobs=1, finished=lambda *_: pytest.fail("trained again"))
    assert stored_commands(tmp_path) == [c.replace(f"'{file}:make'", f"{moved}:make") for c in by_compare]


def test_an_edited_task_is_drawn_as_it_is_now_and_the_page_says_what_is_left_out(normwise_command, tmp_path):
    edited = TASK.replace('"mine"', '"mine"  # edited')
    with Store(tmp_path / "runs.sqlite") as store:
        for number, (text, norms) in enumerate([(TASK, ["none", "layer"]), (edited, ["layer"])]):
            file = tmp_path / f"mine_{number}.py"  # a process keeps what a file made
            file.write_text(text)
            one = expand(f"{file}:make", seeds=1, norms=norms, batch_sizes=[16], learning_rates=[0.1], steps=3)
            sweep(one, store, jobs=1, finished=lambda *_: None)
    said = (
        "Version 2 of 2 is drawn, the newest, with 1 run; 2 runs of the other are left out. They differ in the task's "
        "file or a module of its own; "
    )
    status, out, _ = normwise_command("report", "--out", str(tmp_path))
    assert status == 0
    assert f"mine: {said}`normwise runs list` numbers them.\n" in out
    text = unescape((tmp_path / "report.html").read_text("utf-8"))
    assert f'<p class="soft">{said}normwise runs list numbers them.</p>' in text
    assert {re.findall("--norms (\\w+)", command)[0] for command in commands_of(tmp_path)} == {"layer"}
