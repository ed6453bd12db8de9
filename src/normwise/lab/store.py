"""All runs of an output folder in one SQLite file.

A run is written in one transaction when it is finished, so what is in the file is whole. Series are kept as JSON
arrays, which SQLite can read itself (``json_each``); a value that is not finite is null there.
"""

from __future__ import annotations

import json
import math
import os
import platform
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from normwise.lab.errors import StoreError
from normwise.lab.strict_json import to_json

SCHEMA_VERSION = 1
BUSY_SECONDS = 30
APPLICATION_ID = 0x6E776C62  # "nwlb", so that another program's database is not taken for a store

SCHEMA = """
CREATE TABLE runs (
    key TEXT PRIMARY KEY,      -- sha256 of identity
    identity TEXT NOT NULL,    -- JSON: everything that determines the run
    status TEXT NOT NULL CHECK (status IN ('done', 'undefined', 'diverged')),
    reason TEXT NOT NULL,
    machine TEXT NOT NULL,
    finished TEXT NOT NULL DEFAULT (datetime('now'))  -- UTC
);
CREATE TABLE series (
    run TEXT NOT NULL REFERENCES runs (key),
    name TEXT NOT NULL,
    position INTEGER NOT NULL, -- the order in which the run recorded them: layers come in the net's order
    steps TEXT NOT NULL,       -- JSON array of integers
    vals TEXT NOT NULL,        -- JSON array of numbers or null, as long as steps
    PRIMARY KEY (run, name)
) WITHOUT ROWID;
"""

# Beside the runs: where a user's task was last found is no part of what a run is. Made when it is first needed, so that
# it is in stores of any age, and nobody who reads the runs alone meets another schema.
REFERENCES = """
CREATE TABLE IF NOT EXISTS task_references (
    source TEXT PRIMARY KEY,   -- as in the identity of the runs
    reference TEXT NOT NULL    -- FILE.py:function
) WITHOUT ROWID
"""


class SeriesLike(Protocol):
    """Values over steps."""

    steps: list[int]
    values: list[float]


class ResultLike(Protocol):
    """What ``Store.add`` writes: a finished run, as ``lab/run.py`` returns it."""

    @property
    def status(self) -> str: ...
    @property
    def reason(self) -> str: ...
    @property
    def series(self) -> Mapping[str, SeriesLike]: ...


@dataclass(frozen=True)
class Curve:
    """A stored series; NaN where the value was not finite."""

    steps: list[int]
    values: list[float]


@dataclass(frozen=True)
class Run:
    """A stored run."""

    key: str
    identity: dict[str, Any]
    status: str
    reason: str
    machine: str
    series: dict[str, Curve] = field(default_factory=dict)
    finished: str = ""
    """When it was stored: UTC, as in 2026-01-31 17:05:09."""


class Store:
    """The file ``path``, made if it is not there. Use as a context manager.

    Any number of processes may read and write it at once: SQLite's log of writes (WAL) lets them, and a writer waits
    up to ``BUSY_SECONDS`` for another.

    Args:
        path: the file.
        make: False for a store that is only read and must be there already; its disk may be read-only.
        maker: the subcommand that would make the store, named where it is not there.

    Raises:
        StoreError: the file is damaged, newer than this normwise or no store at all; it is left as it is. Or it
            cannot be made or written: no such folder, no permission, no space.
    """

    def __init__(self, path: Path, *, make: bool = True, maker: str = "compare") -> None:
        self.path = path
        if path.exists() and not path.is_file():
            raise StoreError(f"{path} is no file, and so no store of normwise. {_CURE}")
        if not make and not path.exists():
            raise StoreError(f"{path}: no such store; `normwise {maker} --out {path.parent}` makes one")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"{path.parent} cannot be made ({error.strerror}): give another --out") from error
        if not self._empty():
            self._check()
        with self._named():
            if not make and not os.access(path.parent, os.W_OK):
                self._connection = self._open_to_read("mode=ro" if self._traces()[2] else "immutable=1")
                return
            self._connection = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None)
            if self._empty():
                self._create()
            self._use_wal()
            self._connection.execute("PRAGMA synchronous = NORMAL")
            self._connection.execute("PRAGMA foreign_keys = ON")

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def _empty(self) -> bool:
        return not self.path.exists() or self.path.stat().st_size == 0

    def _check(self) -> None:
        """Look at the file without writing, not even a file beside it: first its header, then all of its pages."""
        before = self._traces()
        _, _, wal, journal = before
        with self.path.open("rb") as file:
            header = file.read(16)
        if header != b"SQLite format 3\x00" and not journal:
            raise StoreError(f"{self.path} is damaged or no store of normwise (it is no SQLite file). {_CURE}")
        try:
            # A journal is left where a process was killed as it made the file: to undo that, SQLite has to write.
            self._check_pages("mode=rw" if journal else "mode=ro" if wal else "immutable=1")
        except StoreError:
            # Another process may have written while we read without a lock: then look again, with one.
            if self._traces() == before:
                raise
            self._check_pages("mode=ro")

    def _traces(self) -> tuple[int, int, bool, bool]:
        """What tells that another process writes: size, time of change, and the two files that SQLite keeps beside."""
        status = self.path.stat()
        wal, journal = (self.path.with_name(self.path.name + suffix).exists() for suffix in ("-wal", "-journal"))
        return status.st_size, status.st_mtime_ns, wal, journal

    def _open_to_read(self, mode: str) -> sqlite3.Connection:
        """``mode`` is SQLite's: a file that is called immutable is read without the files for locking beside it."""
        return sqlite3.connect(f"{self.path.absolute().as_uri()}?{mode}", uri=True, timeout=BUSY_SECONDS)

    def _check_pages(self, mode: str) -> None:
        try:
            connection = self._open_to_read(mode)
            try:
                (application,) = connection.execute("PRAGMA application_id").fetchone()
                (version,) = connection.execute("PRAGMA user_version").fetchone()
                problems = [row[0] for row in connection.execute("PRAGMA quick_check(3)")]
            finally:
                connection.close()
        except sqlite3.DatabaseError as error:
            raise StoreError(f"{self.path} is damaged ({error}). {_CURE}") from error
        if self._empty():  # what a killed process had begun to make is undone
            return
        if application != APPLICATION_ID:
            raise StoreError(f"{self.path} is an SQLite file, but no store of normwise. {_CURE}")
        if version > SCHEMA_VERSION:
            raise StoreError(
                f"{self.path} has schema version {version}, and this normwise reads up to {SCHEMA_VERSION}: a newer "
                "normwise wrote it. Upgrade normwise, or give another --out; the file is left alone."
            )
        if problems != ["ok"]:
            raise StoreError(f"{self.path} is damaged ({'; '.join(problems)}). {_CURE}")

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            if hasattr(self, "_connection"):
                self._connection.close()
            cure = next((cure for words, cure in _CURES.items() if words in str(error)), _CURE)
            raise StoreError(f"{self.path}: {error}. {cure}") from error

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            if self._connection.in_transaction:  # a full disk has ended it already
                self._connection.execute("ROLLBACK")
            raise
        self._connection.execute("COMMIT")

    def _create(self) -> None:
        with self._transaction():
            # Another process may have made the tables between our look and our turn.
            if self._connection.execute("PRAGMA user_version").fetchone()[0]:
                return
            for statement in SCHEMA.split(";")[:-1]:
                self._connection.execute(statement)
            self._connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            self._connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    def _use_wal(self) -> None:
        """Readers and one writer side by side. The switch, made once a file, does not wait for others itself."""
        for _ in range(100):
            try:
                self._connection.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:  # noqa: PERF203 (waiting is the point)
                if "locked" not in str(error):
                    raise
                time.sleep(0.1)
        raise StoreError(f"{self.path} has been locked by another process for 10 s: let it finish, then start again")

    def add(self, key: str, identity: Mapping[str, Any], result: ResultLike, *, machine: str | None = None) -> None:
        """Write a finished run, made by ``machine`` (default: this one). A run that is there stays as it is."""
        row = (key, to_json(identity, sort_keys=True), result.status, result.reason, machine or this_machine())
        with self._named(), self._transaction():
            cursor = self._connection.execute(
                "INSERT OR IGNORE INTO runs (key, identity, status, reason, machine) VALUES (?, ?, ?, ?, ?)", row
            )
            if cursor.rowcount == 0:
                return
            self._connection.executemany(
                "INSERT INTO series VALUES (?, ?, ?, ?, ?)",
                [
                    (key, name, position, to_json(series.steps), _dump(series.values))
                    for position, (name, series) in enumerate(result.series.items())
                ],
            )

    def note_reference(self, source: str, reference: str) -> None:
        """Keep by which words a user's task was called, ``FILE.py:function``: the last ones count."""
        if self.references().get(source) == reference:
            return
        with self._named(), self._transaction():
            self._connection.execute(REFERENCES)
            self._connection.execute("INSERT OR REPLACE INTO task_references VALUES (?, ?)", (source, reference))

    def references(self) -> dict[str, str]:
        """By which words each task of the user's was last called; the keys are the sources in the runs' identities."""
        with self._named():
            there = self._connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'task_references'").fetchone()
            return dict(self._connection.execute("SELECT * FROM task_references")) if there else {}

    def keys(self) -> set[str]:
        """The keys of all stored runs."""
        with self._named():
            return {key for (key,) in self._connection.execute("SELECT key FROM runs")}

    def has(self, key: str) -> bool:
        """Whether a run is stored. Any thread may ask, which is why this connection is its own."""
        with self._named(), closing(sqlite3.connect(self.path, timeout=BUSY_SECONDS)) as connection:
            return connection.execute("SELECT 1 FROM runs WHERE key = ?", (key,)).fetchone() is not None

    def runs(self, keys: Iterable[str]) -> list[Run]:
        """The stored runs among ``keys``, in that order, with their series."""
        found = []
        with self._named():
            for key in keys:
                row = self._connection.execute(f"SELECT {_COLUMNS} FROM runs WHERE key = ?", (key,)).fetchone()
                if row is None:
                    continue
                series = {
                    name: Curve(json.loads(steps), _load(values))
                    for name, steps, values in self._connection.execute(
                        "SELECT name, steps, vals FROM series WHERE run = ? ORDER BY position", (key,)
                    )
                }
                found.append(_run(row, series))
        return found

    def index(self) -> list[Run]:
        """All runs in the order in which they were stored, each series cut down to its last value."""
        with self._named():
            last: dict[str, dict[str, Curve]] = {}
            for key, name, step, value in self._connection.execute(
                "SELECT run, name, json_extract(steps, '$[#-1]'), json_extract(vals, '$[#-1]') FROM series "
                "ORDER BY run, position"
            ):
                last.setdefault(key, {})[name] = Curve([step], [math.nan if value is None else value])
            rows = self._connection.execute(f"SELECT {_COLUMNS} FROM runs ORDER BY rowid").fetchall()
        return [_run(row, last.get(row[0], {})) for row in rows]


_COLUMNS = "key, identity, status, reason, machine, finished"


def _run(row: tuple[str, ...], series: dict[str, Curve]) -> Run:
    key, identity, status, reason, machine, finished = row
    return Run(key, json.loads(identity), status, reason, machine, series, finished)


_CURE = "It is left as it is: move it away, or give another --out."
_NO_WRITING = "or its disk is read-only: change that, or give another --out."
_CURES = {
    "disk is full": "Free some space and start again: what was stored before is kept.",
    "disk I/O error": "See whether its disk is full, limited or gone, and start again: what was stored before is kept.",
    "readonly": f"You have no permission to write it, {_NO_WRITING}",
    "unable to open": f"You have no permission to make it there, {_NO_WRITING}",
    "locked": f"Another process has been writing for {BUSY_SECONDS} s: let it finish, then start again.",
}


def this_machine() -> str:
    """Where the numbers were made: operating system, processor, Python."""
    return f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"


def _dump(values: list[float]) -> str:
    # Six digits are more than float32 training reproduces elsewhere, and keep the file small.
    return to_json([float(f"{value:.6g}") for value in values])


def _load(text: str) -> list[float]:
    return [math.nan if value is None else value for value in json.loads(text)]
