from __future__ import annotations

import pytest

from normwise.lab import pictures
from normwise.lab.errors import LabError
from support.browser import CHROMIUM

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine; Debian has it as 'chromium'")

PAGE = """<section role="tabpanel" id="mlp" hidden><figure data-picture="loss"
style="width: 300px; height: 50px; margin: 0; background: red"></figure></section>
<section role="tabpanel" id="cnn"><p data-picture="loss">text</p></section>"""


def size(png: bytes) -> tuple[int, int]:
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    return int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")


@needs_chromium
def test_every_figure_is_a_file_hidden_ones_too(tmp_path):
    (tmp_path / "page.html").write_text(f"<!doctype html><meta charset=utf-8>{PAGE}")
    written = pictures.write_pictures(tmp_path / "page.html", tmp_path / "new" / "folder", pictures.find_browser())
    assert [path.name for path in written] == ["mlp-loss.png", "cnn-loss.png"]
    assert size(written[0].read_bytes()) == (600, 100)  # twice the pixels


def test_no_browser_is_an_error_with_the_cure(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LabError, match=r"--png needs a Chromium or Chrome.*apt install chromium"):
        pictures.find_browser()


@pytest.mark.parametrize("program", ["false", "true"])
def test_a_browser_that_does_not_start_is_an_error(tmp_path, program):
    (tmp_path / "page.html").write_text(PAGE)
    with pytest.raises(LabError, match=rf"{program} ended or was silent"):
        pictures.write_pictures(tmp_path / "page.html", tmp_path, program)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LabError, match=r"file/pictures cannot be made \(Not a directory\)"):
        pictures.write_pictures(tmp_path / "page.html", tmp_path / "file" / "pictures", "true")
