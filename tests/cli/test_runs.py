from __future__ import annotations

import csv
import json
import math
import sqlite3
import sys

import pytest

from normwise.lab import runs as module
from normwise.lab.run import Result, Series
from normwise.lab.store import SCHEMA_VERSION, Store


def identity(norm, seed):
    return {
        "task": "mlp",
        "norm": norm,
        "batch_size": 8,
        "learning_rate": 0.1,
        "seed": seed,
        "steps": 3,
        "settings": {"width": 100},
        "source": "abc",
        "lab": "def",
        "normwise": "0.1.0",
        "torch": "2.13.0",
        "backend": "auto",
    }


@pytest.fixture
def folder(tmp_path):
    series = {"train/loss": Series([0, 1, 2], [2.0, math.inf, 0.5]), "final/accuracy": Series([3], [0.875])}
    with Store(tmp_path / "runs.sqlite") as store:
        store.add("aa11", identity("batch", 0), Result("done", "", series))
        store.add("aa22", identity("layer", 0), Result("done", "", series))
        store.add("bb33", identity("instance", 1), Result("undefined", "one position a channel"))
    return tmp_path


def test_list_prints_a_row_per_run(normwise_command, folder):
    status, out, err = normwise_command("runs", "list", "--out", str(folder))
    assert (status, err) == (0, "")
    first, *rows = out.splitlines()
    assert first.split() == ["key", "task", "norm", "batch", "rate", "seed", "steps", "status", "accuracy", "loss"]
    assert rows[0].split() == ["aa11", "mlp", "batch", "8", "0.1", "0", "3", "done", "87.5%", "0.5000"]
    assert rows[2].split() == ["bb33", "mlp", "instance", "8", "0.1", "1", "3", "undefined"]
    assert f"3 runs in {folder / 'runs.sqlite'}" in rows
    assert max(map(len, [first, *rows[:3]])) <= 80


@pytest.mark.parametrize(
    "filters",
    [("--status", "diverged"), ("--norm", "instance", "--status", "done"), ("--task", "cnn", "--norm", "layer")],
)
def test_a_filter_that_no_run_passes_gives_an_empty_list(normwise_command, folder, filters):
    with Store(folder / "runs.sqlite") as store:
        store.add("cc44", identity("batch", 0) | {"task": "cnn"}, Result("done", "", {}))
    status, out, err = normwise_command("runs", "list", *filters, "--out", str(folder))
    assert (status, err) == (0, "")
    assert out.splitlines()[-1] == f"0 runs in {folder / 'runs.sqlite'}"
    listed = normwise_command("runs", "list", *filters, "--json", "--out", str(folder))
    assert (listed.status, json.loads(listed.out)) == (0, [])
    for kind in ("csv", "parquet"):
        file = folder / f"none.{kind}"
        done = normwise_command("runs", "export", f"--{kind}", str(file), *filters, "--out", str(folder))
        assert (done.status, done.out) == (0, f"{file}: 0 rows of 0 runs\n")


def test_runs_of_a_task_that_was_edited_are_told_apart(normwise_command, tmp_path):
    with Store(tmp_path / "runs.sqlite") as store:
        for key, norm, task, changes in (
            ("aa11", "batch", "mine", {}),
            ("aa22", "batch", "mine", {"source": "edited"}),
            ("aa33", "layer", "mine", {"source": "edited"}),
            ("aa44", "layer", "mlp", {}),
        ):
            store.add(key, {**identity(norm, 0), "task": task, **changes}, Result("undefined", "one position"))
    first, *rows = normwise_command("runs", "list", "--out", str(tmp_path)).out.splitlines()
    assert first.split()[:4] == ["key", "task", "version", "norm"]
    assert [row.split()[:4] for row in rows[:4]] == [
        ["aa11", "mine", "1", "batch"],
        ["aa22", "mine", "2", "batch"],
        ["aa33", "mine", "2", "layer"],
        ["aa44", "mlp", "layer", "8"],
    ]
    assert max(map(len, [first, *rows[:4]])) <= 80
    assert rows[-1].startswith("mine: 2 versions, which differ in the task's file or a module of its own (1 from ")
    alone = normwise_command("runs", "list", "--out", str(tmp_path), "--norm", "layer").out
    assert "version" not in alone


def test_list_can_be_narrowed_and_read_by_programs(normwise_command, folder):
    for arguments, keys in (
        (("--norm", "layer"), ["aa22"]),
        (("--status", "undefined"), ["bb33"]),
        (("--task", "mlp", "--status", "done"), ["aa11", "aa22"]),
    ):
        found = json.loads(normwise_command("runs", "list", "--out", str(folder), "--json", *arguments).out)
        assert [run["key"] for run in found] == keys


def test_show_prints_settings_and_series(normwise_command, folder):
    out = normwise_command("runs", "show", "bb", "--out", str(folder)).out
    assert out.startswith("bb33\n")
    assert "one position a channel" in out
    out = normwise_command("runs", "show", "aa11", "--out", str(folder)).out
    assert "  width          100" in out
    lines = [line.split() for line in out.splitlines()]
    assert ["train/loss", "3", "0.5"] in lines
    out = normwise_command("runs", "show", "aa11", "--series", "train/loss", "--out", str(folder)).out
    assert [line.split() for line in out.splitlines()] == [["train/loss"], ["0", "2"], ["1", "nan"], ["2", "0.5"]]
    found = json.loads(normwise_command("runs", "show", "aa11", "--json", "--out", str(folder)).out)
    assert found["series"]["train/loss"] == {"steps": [0, 1, 2], "values": [2.0, None, 0.5]}
    assert found["identity"] == identity("batch", 0)


def test_export_as_csv(normwise_command, folder):
    target = folder / "runs.csv"
    out = normwise_command("runs", "export", "--csv", str(target), "--out", str(folder)).out
    assert out == f"{target}: 8 rows of 3 runs\n"
    rows = list(csv.DictReader(target.read_text().splitlines()))
    assert tuple(rows[0]) == module.VALUE_COLUMNS
    assert [row["value"] for row in rows[:4]] == ["2.0", "nan", "0.5", "0.875"]
    assert rows[7]["key"] == "aa22"
    normwise_command("runs", "export", "--csv", str(target), "--summary", "--out", str(folder))
    rows = list(csv.DictReader(target.read_text().splitlines()))
    assert [row["status"] for row in rows] == ["done", "done", "undefined"]
    assert json.loads(rows[0]["last_values"]) == {"train/loss": 0.5, "final/accuracy": 0.875}
    assert rows[2]["reason"] == "one position a channel"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("summary", [False, True])
def test_export_as_parquet_is_what_the_csv_is(normwise_command, folder, summary, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet", reason="the extra normwise[parquet] is not installed")
    monkeypatch.setattr(module, "ROWS_AT_ONCE", 3)
    paths = folder / "runs.parquet", folder / "runs.csv"
    arguments = ("--parquet", str(paths[0]), "--csv", str(paths[1]), "--out", str(folder), *["--summary"] * summary)
    assert normwise_command("runs", "export", *arguments).status == 0
    table = parquet.read_table(paths[0])
    rows = list(csv.DictReader(paths[1].read_text().splitlines()))
    assert table.column_names == list(rows[0])
    assert [{name: str(value) for name, value in row.items()} for row in table.to_pylist()] == rows
    assert str(table.schema.field("seed").type) == "int64"
    assert {file.suffix for file in folder.iterdir()} <= {".parquet", ".csv", ".sqlite"}  # nothing half is left


def test_without_pyarrow_the_extra_is_named(normwise_command, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    status, _, err = normwise_command("runs", "export", "--parquet", str(folder / "x.parquet"), "--out", str(folder))
    assert (status, (folder / "x.parquet").exists()) == (2, False)
    assert err == "normwise: error: the package 'pyarrow' is not installed; run: pip install 'normwise[parquet]'\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("list", "--norm", "bacth"), "unknown norm 'bacth' in this store; did you mean batch?"),
        (("list", "--task", "mpl"), "unknown task 'mpl' in this store; did you mean mlp?"),
        (("list", "--status", "don"), "unknown status 'don'; did you mean done? (known: done, undefined, diverged)"),
        (("show", "aa"), "'aa' is the beginning of the key of 2 runs (aa11, aa22, ..)"),
        (("show", "zz"), "'zz' is the beginning of the key of no run"),
        (("show", "aa11", "--series", "train/los"), "unknown series 'train/los'; did you mean train/loss?"),
        (("export",), "say where to: --csv FILE, --parquet FILE or both"),
        (("export", "--csv", "/nowhere/at/all.csv"), "/nowhere/at/all.csv cannot be written"),
    ],
)
def test_bad_arguments_exit_2(normwise_command, folder, arguments, message):
    status, out, err = normwise_command("runs", *arguments, "--out", str(folder))
    assert (status, out) == (2, "")
    assert message in err


def test_a_store_that_is_not_there_or_newer_is_named_and_left_alone(normwise_command, folder):
    status, _, err = normwise_command("runs", "list", "--out", str(folder / "none"))
    assert status == 2
    assert "no such store; `normwise compare --out" in err
    assert not (folder / "none").exists()
    connection = sqlite3.connect(folder / "runs.sqlite")
    connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    connection.close()
    before = (folder / "runs.sqlite").read_bytes()
    status, _, err = normwise_command("runs", "list", "--out", str(folder))
    assert status == 2
    assert "a newer normwise wrote it. Upgrade normwise" in err
    assert (folder / "runs.sqlite").read_bytes() == before
