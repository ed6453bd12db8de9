from __future__ import annotations

import re

import pytest
import vl_convert

from normwise.lab import pictures
from normwise.lab.errors import LabError
from normwise.lab.figures import Figure
from normwise.lab.plot import Line, Panel
from normwise.lab.plot_heat import heat_map
from normwise.lab.score import score
from normwise.lab.spec import expand
from normwise.lab.store import Store
from normwise.lab.sweep import sweep
from normwise.lab.tasks import load_task

TASKS = {"mlp": load_task("mlp").task}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    specs = expand("mlp", seeds=2, norms=["none", "instance"], batch_sizes=[16], learning_rates=[0.1], steps=3)
    with Store(tmp_path_factory.mktemp("pictures") / "runs.sqlite") as store:
        sweep(specs, store, jobs=1, finished=lambda *_: None)
        return score(store.runs(spec.key() for spec in specs))


def size(png: bytes) -> tuple[int, int]:
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    return int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")


def test_every_figure_is_a_file_drawn_without_a_browser(rows, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    written = pictures.write_pictures(rows, TASKS, tmp_path / "new" / "folder")
    names = [path.name for path in written]
    assert names[:2] == ["mlp-held-out-accuracy-by-norm-and-batch-size.png", "mlp-training-loss.png"]
    assert len(set(names)) == len(names) > 6
    for path in written:
        width, height = size(path.read_bytes())
        assert min(width, height) > 100


def test_a_picture_has_the_light_page_s_colours_and_a_legend():
    lines = [Line("batch", [0, 1], [1.0, 2.0]), Line("<mine>", [0, 1], [2.0, 1.0])]
    figure = Figure("Loss", "", [Panel("a", lines), Panel("b", lines), Panel("c", lines, choice=1)])
    spec = pictures.together(figure)
    assert [one["title"] for one in spec["concat"]] == ["a", "b"]  # one choice, as on the page
    text = pictures.light(spec)
    assert "var(--" not in text
    assert "#0072b2" in text
    assert '"legend": {"title": null' in text
    alone = pictures.together(Figure("Loss", "", [Panel("a", lines[:1])]))
    assert '"symbolType"' not in pictures.light(alone)


def test_panels_of_one_norm_each_keep_their_colours():
    panels = [Panel(norm, [Line(norm, [0, 1], [1.0, 2.0])]) for norm in ("none", "batch")]
    drawn = vl_convert.vegalite_to_svg(pictures.light(pictures.together(Figure("Inputs", "", panels))))
    strokes = re.findall(r'<path d=[^>]* stroke="(#\w+)"', drawn)
    assert strokes == ["#6e6e6e", "#0072b2"]


def test_the_heat_map_has_a_square_for_each_number():
    spec = heat_map("t", [("none", 8, 6, "91.0%"), ("batch", 8, 52, "95.0%"), ("batch", 1, 0, "undefined")])
    (values,) = spec["datasets"].values()
    assert [row["text"] for row in values] == ["91.0%", "95.0%", "undefined"]
    assert pictures.light(spec).count("91.0%") == 1


def test_a_folder_that_cannot_be_made_is_named(rows, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LabError, match=r"file/pictures cannot be made \(Not a directory\)"):
        pictures.write_pictures(rows, TASKS, tmp_path / "file" / "pictures")


def test_a_file_that_cannot_be_written_is_named(rows, tmp_path):
    (tmp_path / "mlp-training-loss.png").mkdir()
    with pytest.raises(LabError, match=r"mlp-training-loss.png cannot be written \(Is a directory"):
        pictures.write_pictures(rows, TASKS, tmp_path)
