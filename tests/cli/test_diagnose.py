from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

import normwise

EXAMPLE = f"{Path(__file__).parent.parent.parent / 'examples' / 'diagnose_me.py'}:make"
PLANTED = ["NW001", "NW006", "NW005", "NW011"]


def test_text_and_page(normwise_command, tmp_path):
    status, out, err = normwise_command("diagnose", EXAMPLE, "--out", str(tmp_path / "new"))
    assert (status, err) == (0, "")
    assert max(map(len, out.splitlines()[:-1])) <= 80
    assert [line[:5] for line in out.splitlines() if line.startswith("NW")] == PLANTED
    assert "<h1>What normalization does in Classifier</h1>" in (tmp_path / "new" / "diagnosis.html").read_text("utf-8")


def test_json_is_the_diagnosis(normwise_command, tmp_path):
    status, out, err = normwise_command("diagnose", EXAMPLE, "--out", str(tmp_path), "--json", "--max-batches", "3")
    assert (status, err) == (0, "")
    found = normwise.Diagnosis.from_dict(json.loads(out))
    assert [f.code for f in found.findings] == PLANTED
    assert found.data.batches == 3


def test_strict_fails_until_all_is_silenced(normwise_command, tmp_path):
    out = ("--out", str(tmp_path))
    assert normwise_command("diagnose", EXAMPLE, "--strict", *out).status == 1
    silenced = [word for code in PLANTED[1:] for word in ("--ignore", code)]
    assert normwise_command("diagnose", EXAMPLE, "--strict", *silenced, *out).status == 1
    done = normwise_command("diagnose", EXAMPLE, "--strict", *silenced, "--ignore", "NW001:norm?", *out)
    assert done.status == 0
    assert "4 more silenced: NW001, NW005, NW006, NW011" in done.out


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("nowhere.py:make", "'nowhere.py': no such file"),
        ("model.py", "is not of the form FILE.py:function, as in examples/diagnose_me.py:make"),
        ("{dir}/model.py:other", "no function 'other' in this file"),
        ("{dir}/model.py:two", "returned a tuple of 2: expected (model, batches, loss)"),
    ],
    ids=["no file", "no function named", "no such function", "too little"],
)
def test_what_cannot_be_diagnosed(normwise_command, tmp_path, source, says):
    (tmp_path / "model.py").write_text(
        "import torch\ndef two():\n    return torch.nn.Linear(2, 2), []\n",
        encoding="utf-8",
    )
    status, out, err = normwise_command("diagnose", source.format(dir=tmp_path), "--out", str(tmp_path / "out"))
    assert (status, out) == (2, "")
    assert says in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--ignore", "NW999"), "ignore names the unknown code 'NW999': did you mean"),
        (("--max-seconds", "-1"), "max_seconds must be a positive number of seconds or None, but got -1.0"),
        ((), "pyproject.toml: ignore names the unknown code 'NW998': did you mean"),
    ],
)
def test_settings_are_refused_before_the_user_s_file_runs(normwise_command, tmp_path, monkeypatch, words, says):
    monkeypatch.chdir(tmp_path)
    if not words:
        (tmp_path / "pyproject.toml").write_text("[tool.normwise.diagnose]\nignore = ['NW998']\n", encoding="utf-8")
    (tmp_path / "model.py").write_text("open('it ran', 'w').close()\ndef make(): ...\n", encoding="utf-8")
    status, out, err = normwise_command("diagnose", "model.py:make", *words)
    assert (status, out) == (2, "")
    assert says in err
    assert not (tmp_path / "it ran").exists()


def test_a_full_disk_leaves_nothing_half_written(normwise_command, tmp_path, monkeypatch):
    def full(self, *_, **__):
        self.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    status, _, err = normwise_command("diagnose", EXAMPLE, "--out", str(tmp_path))
    assert status == 2
    assert "cannot be written: No space left" in " ".join(err.split())
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written(normwise_command, tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    status, _, err = normwise_command("diagnose", EXAMPLE, "--out", str(tmp_path / "file" / "in it"))
    assert status == 2
    assert "cannot be written" in err
