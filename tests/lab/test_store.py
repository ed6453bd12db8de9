from __future__ import annotations

import math
import os
import re
import shutil
import sqlite3
from concurrent.futures import ThreadPoolExecutor

import pytest

from normwise.lab import store as module
from normwise.lab.errors import StoreError
from normwise.lab.run import Result, Series
from normwise.lab.store import Store

RESULT = Result(
    "done", "", {"train/loss": Series([0, 1, 2], [2.5, math.inf, 1 / 3]), "final/accuracy": Series([3], [0.5])}
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "out" / "runs.sqlite"


def test_what_is_added_comes_back(path):
    with Store(path) as store:
        store.add("b", {"task": "mlp", "seed": 0}, RESULT)
        store.add("a", {"task": "mlp", "seed": 1}, Result("undefined", "one value"))
    with Store(path) as store:
        assert store.keys() == {"a", "b"}
        first, second = store.runs(["a", "missing", "b"])
    assert (first.key, first.status, first.reason, first.series) == ("a", "undefined", "one value", {})
    assert second.identity == {"task": "mlp", "seed": 0}
    assert list(second.series) == ["train/loss", "final/accuracy"]
    assert second.series["train/loss"].steps == [0, 1, 2]
    low, infinite, third = second.series["train/loss"].values
    assert (low, third) == (2.5, pytest.approx(1 / 3, rel=1e-5))
    assert math.isnan(infinite)


def test_the_index_has_the_last_value_of_every_series_and_what_made_the_run(path):
    with Store(path) as store:
        store.add("b", {"seed": 0}, RESULT, machine="elsewhere")
        store.add("a", {"seed": 1}, Result("undefined", "one value"))
        first, second = store.index()
        assert (store.has("b"), store.has("c")) == (True, False)
    assert (first.key, first.identity, first.machine) == ("b", {"seed": 0}, "elsewhere")
    assert list(first.series) == ["train/loss", "final/accuracy"]
    assert (first.series["train/loss"].steps, first.series["train/loss"].values) == ([2], [0.333333])
    assert (second.key, second.status, second.series, second.machine) == ("a", "undefined", {}, module.this_machine())
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", second.finished)


def test_a_stored_run_stays_as_it_is(path):
    with Store(path) as store:
        store.add("a", {}, RESULT)
        store.add("a", {"other": 1}, Result("diverged", "later"))
        (run,) = store.runs(["a"])
    assert (run.status, run.identity, len(run.series)) == ("done", {}, 2)


def test_a_run_is_written_whole_or_not_at_all(path, monkeypatch):
    with Store(path) as store:
        monkeypatch.setattr(module, "_dump", lambda values: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            store.add("a", {}, RESULT)
        assert store.keys() == set()
        monkeypatch.undo()
        store.add("a", {}, RESULT)
        assert store.keys() == {"a"}


def test_the_file_is_what_it_says(path):
    with Store(path) as store:
        store.add("a", {}, RESULT)
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA user_version").fetchone() == (module.SCHEMA_VERSION,)
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    query = "SELECT e.value FROM series, json_each(vals) e WHERE name = 'train/loss'"
    assert connection.execute(query).fetchall() == [(2.5,), (None,), (0.333333,)]
    connection.close()


def test_two_processes_may_share_a_store(path):
    with Store(path) as one, Store(path) as other:
        one.add("a", {}, RESULT)
        assert other.keys() == {"a"}
        other.add("b", {}, RESULT)
        assert one.keys() == {"a", "b"}


def test_a_store_opened_by_many_at_once_is_made_once(path):
    def add(number):
        with Store(path) as store:
            store.add(str(number), {}, RESULT)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(16)))
    with Store(path) as store:
        assert len(store.keys()) == 16


def refused(path, match):
    before = path.read_bytes()
    with pytest.raises(StoreError, match=match) as caught:
        Store(path)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.fixture
def full(path):
    with Store(path) as store:
        for number in range(50):
            store.add(str(number), {"filler": "x" * 500}, RESULT)
    return path


def test_a_newer_store_is_left_alone(full):
    with sqlite3.connect(full) as connection:
        connection.execute("DROP TABLE series")  # what a newer one looks like inside is not ours to know
        connection.execute(f"PRAGMA user_version = {module.SCHEMA_VERSION + 1}")
    connection.close()
    refused(full, "newer normwise wrote it. Upgrade normwise")


def test_a_truncated_store_is_left_alone(full):
    full.write_bytes(full.read_bytes()[:10_000])
    refused(full, "is damaged .*move it away, or give another --out")


def test_a_store_with_rubbish_in_it_is_left_alone(full):
    content = bytearray(full.read_bytes())
    content[4096:20_000] = b"\xa5" * (20_000 - 4096)
    full.write_bytes(content)
    refused(full, "is damaged")


@pytest.mark.parametrize("content", [b"not a database at all", b"SQLite format 3\x00" + bytes(200)])
def test_another_file_is_left_alone(path, content):
    path.parent.mkdir()
    path.write_bytes(content)
    refused(path, "damaged or no store|is damaged|no store of normwise")


def test_another_program_s_database_is_left_alone(path):
    path.parent.mkdir()
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE runs (x)")
    connection.close()
    refused(path, "an SQLite file, but no store of normwise")


def test_a_full_disk_is_named_and_loses_nothing_that_was_stored(full):
    with Store(full) as store:
        (pages,) = store._connection.execute("PRAGMA page_count").fetchone()
        store._connection.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(StoreError, match=r"database or disk is full. Free some space and start again: what was"):
            store.add("large", {"filler": "x" * 100_000}, RESULT)
    with Store(full) as store:
        assert len(store.keys()) == 50
        store.add("large", {}, RESULT)
        assert len(store.keys()) == 51


def test_a_store_that_another_process_holds_is_named(path, monkeypatch):
    monkeypatch.setattr(module, "BUSY_SECONDS", 0.1)
    with Store(path) as store:
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match=r"database is locked. Another process has been writing"):
            store.add("a", {}, RESULT)
        other.close()
    with Store(path) as store:
        assert store.keys() == set()


def test_a_store_to_read_is_not_made(path):
    with pytest.raises(StoreError, match=r"no such store; `normwise compare --out .*` makes one"):
        Store(path, make=False)
    assert not path.parent.exists()


def test_a_folder_in_its_place_is_named(path):
    path.mkdir(parents=True)
    for make in (True, False):
        with pytest.raises(StoreError, match=r"runs\.sqlite is no file, and so no store of normwise\. .*another --out"):
            Store(path, make=make)


def test_a_store_on_a_read_only_disk_can_be_read(full, monkeypatch):
    monkeypatch.setattr("os.access", lambda *_: False)
    before = full.read_bytes()
    with Store(full, make=False) as store:
        assert len(store.index()) == len(store.keys()) == 50
        with pytest.raises(StoreError, match="You have no permission to write it, or its disk is read-only"):
            store.add("more", {}, RESULT)
    assert [file.name for file in full.parent.iterdir()] == [full.name]
    assert full.read_bytes() == before


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"file cannot be made .*give another --out"):
        Store(tmp_path / "file" / "runs.sqlite")


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="permissions do not bind this user")
def test_a_folder_without_permission_is_named(path):
    path.parent.mkdir(mode=0o500)
    with pytest.raises(StoreError, match="You have no permission to make it there"):
        Store(path)


def test_a_process_killed_as_it_made_the_file_is_undone(path):
    """Its journal is there, and some of its pages are in the file."""
    path.parent.mkdir()
    begun = path.with_name("begun")
    connection = sqlite3.connect(begun, isolation_level=None)
    connection.execute("PRAGMA cache_size = 1")
    connection.execute("BEGIN")
    connection.execute("CREATE TABLE runs (x)")
    connection.executemany("INSERT INTO runs VALUES (?)", [("y" * 3000,)] * 200)
    shutil.copy(begun, path)
    shutil.copy(f"{begun}-journal", f"{path}-journal")
    connection.close()
    assert path.stat().st_size > 0
    with Store(path) as store:
        store.add("a", {}, RESULT)
        assert store.keys() == {"a"}


def test_a_store_without_references_has_none_and_takes_them(path):
    with Store(path) as store:
        assert store.references() == {}
        store.note_reference("abc:make", "one.py:make")
        store.note_reference("abc:make", "two.py:make")
        store.note_reference("def:make", "one.py:make")
    with Store(path, make=False) as store:
        assert store.references() == {"abc:make": "two.py:make", "def:make": "one.py:make"}
