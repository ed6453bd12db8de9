from __future__ import annotations

import re

import pytest

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


TASK = """
from normwise.lab.tasks.mlp import Mlp

class Mine(Mlp):
    name = "mine"

def make():
    return Mine()
"""


def commands_of(folder):
    return re.findall(r"normwise compare [^<]*", (folder / "report.html").read_text(encoding="utf-8"))


def test_its_commands_name_the_users_file_and_say_where_it_has_changed(normwise_command, tmp_path):
    file = tmp_path / "my task.py"
    file.write_text(TASK)
    assert normwise_command("compare", "--task", f"{file}:make", *SMALL, "--out", str(tmp_path)).status == 0
    by_compare = commands_of(tmp_path)
    assert all(f"--task &#39;{file}:make&#39; --norms" in command for command in by_compare)
    assert normwise_command("report", "--out", str(tmp_path)).status == 0
    assert commands_of(tmp_path) == by_compare
    file.write_text(TASK.replace('"mine"', '"mine"  # edited'))
    normwise_command("report", "--out", str(tmp_path))
    assert commands_of(tmp_path)
    assert all("--out again  # the file, or a module of its own, has been edited" in c for c in commands_of(tmp_path))
    file.rename(tmp_path / "moved.py")
    normwise_command("report", "--out", str(tmp_path))
    assert all("--out again  # the file is not there any more" in c for c in commands_of(tmp_path))
    moved = ("--task", f"{tmp_path / 'moved.py'}:make")
    (tmp_path / "moved.py").write_text(TASK)
    normwise_command("compare", *moved, *SMALL, "--out", str(tmp_path))  # trains nothing
    normwise_command("report", "--out", str(tmp_path))
    assert all("moved.py:make --norms" in c and "#" not in c.replace("&#", "") for c in commands_of(tmp_path))
