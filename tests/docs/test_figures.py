"""The pictures of README.md and docs/: those that are shown are there, and show what the tables beside them say."""

from __future__ import annotations

import importlib.util
import re

import pytest

from support.pages import PAGES, ROOT

IMAGES = ROOT / "docs" / "images"


@pytest.fixture(scope="module")
def script():
    found = importlib.util.spec_from_file_location("make_readme_figures", ROOT / "scripts" / "make_readme_figures.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_the_lstm_figure_was_drawn_from_readme_s_table(script):
    assert script.numbers_of((IMAGES / "lstm-speed.png").read_bytes()) == script.lstm_table()


def test_readme_s_sentence_on_the_lstm_has_the_table_s_extremes(script):
    (sentence,) = re.findall(r"a training step of `normwise.LSTM` takes .*?\.\s\[", read("README.md"), re.DOTALL)
    shares = {against: [] for against in ("plain", "written")}
    for row in script.lstm_table():
        shares[row["against"]].append(row["share"])
    ranges = re.findall(r"(\d\.\d+) to (\d\.\d+)", sentence)
    assert ranges == [(f"{min(found):.2f}", f"{max(found):.2f}") for found in shares.values()]


def test_masked_statistics_are_exact_to_rounding_in_its_figure(script):
    errors = script.numbers_of((IMAGES / "masked-statistics.png").read_bytes())
    assert errors["ours"] < 2e-7
    assert errors["torch"] > 1


def test_pictures_are_shown_and_are_there():
    shown = set()
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for path in re.findall(r"!\[[^]]*\]\(([^)]+\.png)\)|<img src=\"([^\"]+)\"", text):
            shown.add((page.parent / "".join(path)).resolve())
    assert shown == set(IMAGES.glob("*.png"))


def test_the_pictures_of_the_script_are_small(script):
    assert [name for name in script.PICTURES if (IMAGES / f"{name}.png").stat().st_size > script.MOST_BYTES] == []


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")
