"""docs/papers.md has the tables that the command makes of docs/papers.json, and the pictures that it draws."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

from normwise.lab.spec import Spec
from normwise.lab.store import Curve, Run

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


@pytest.fixture
def script(tmp_path):
    """The command, on a copy of the page."""
    found = importlib.util.spec_from_file_location("make_papers_page", ROOT / "scripts" / "make_papers_page.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    module.DOCS = tmp_path
    (tmp_path / "images").mkdir()
    for name in ("papers.json", "papers.md"):
        (tmp_path / name).write_bytes((DOCS / name).read_bytes())
    return module


def test_the_tables_are_what_the_command_makes(script, tmp_path):
    page = (DOCS / "papers.md").read_text("utf-8")
    (tmp_path / "papers.md").write_text(re.sub(r"^\| (none|batch) \|.*$", "| ? |", page, flags=re.M), "utf-8")
    assert (tmp_path / "papers.md").read_text("utf-8") != page
    script.main([])
    assert (tmp_path / "papers.md").read_text("utf-8") == page


def test_every_picture_is_shown():
    page = (DOCS / "papers.md").read_text("utf-8")
    for paper in json.loads((DOCS / "papers.json").read_text("utf-8")):
        drawn = sorted(path.name for path in (DOCS / "images").glob(f"{paper}-*.png"))
        assert drawn
        assert all(f"](images/{name})" in page for name in drawn)


def made(task: str, norm: str, size: int, steps: int, seed: int) -> Run:
    spec = Spec("mlp", norm, size, 0.01, seed, steps)
    identity = {**spec.identity(), "task": task}
    accuracy = 0.9 if norm == "none" else 0.98 + 0.001 * seed
    series = {
        "train/cases": Curve([0], [60_000.0]),
        "train/loss": Curve([0, steps], [2.3, 0.1]),
        "time/step": Curve([0, steps], [0.036, 0.036]),
        "final/accuracy": Curve([steps], [accuracy]),
        "final/loss": Curve([steps], [0.25]),
    }
    return Run(f"{task} {norm} {size} {steps} {seed}", identity, "done", "", "made up", series)


def test_of_each_norm_and_batch_size_the_longest_training_counts(script):
    runs = [made("bn-mnist", "none", 60, 10_000, 0), made("mlp", "batch", 60, 90_000, 0)]
    runs += [made("bn-mnist", "batch", 60, 100, seed) for seed in (0, 1, 2)]
    runs += [made("bn-mnist", "batch", 60, 50_000, seed) for seed in (0, 1)]
    keys = script.longest(runs, "bn-mnist")
    assert keys == ["bn-mnist none 60 10000 0", "bn-mnist batch 60 50000 0", "bn-mnist batch 60 50000 1"]
    rows = script.score(run for run in runs if run.key in keys)
    lines = script.table([script.as_record(row) for row in rows]).splitlines()
    assert lines[2] == "| none | 60 | 10,000 (10) | 1 | 10.00 | 0.2500 | 0.10000 | 0.1 |"
    assert lines[3] == "| batch | 60 | 50,000 (50) | 2 | 1.95 ± 0.07 | 0.2500 ± 0.0000 | 0.10000 ± 0.00000 | 0.5 |"


def test_a_page_without_marks_is_refused(script):
    with pytest.raises(SystemExit, match="lacks the marks <!-- bn-mnist by"):
        script.page({"bn-mnist": []}, "# Papers\n")
