"""Stored runs as tables: which there are, what one of them is, and all of them for other programs."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from normwise.lab.errors import LabError, unknown
from normwise.lab.store import Run, Store
from normwise.lab.strict_json import to_json

SETTINGS = ("task", "norm", "batch_size", "learning_rate", "seed", "steps")
VERSIONS = ("lab", "normwise", "torch", "backend")
STATUSES = ("done", "undefined", "diverged")
WHAT = {
    "settings": "the task's settings or data",
    "source": "the task's file or a module of its own",
    "lab": "the lab's code",
    "normwise": "normwise's version",
    "torch": "torch's version",
    "backend": "the backend",
}
"""What makes versions of a task, in words."""
VALUE_COLUMNS = ("key", *SETTINGS, "status", "series", "step", "value")
RUN_COLUMNS = (
    "key", *SETTINGS, "status", "reason", "machine", "finished", "settings", "source", *VERSIONS, "last_values"
)  # fmt: skip
ROWS_AT_ONCE = 50_000

Table = Iterator[dict[str, Any]]


def chosen(
    runs: Iterable[Run], *, task: str | None = None, norm: str | None = None, status: str | None = None
) -> list[Run]:
    """Those that are of the task, of the norm and of the status; no run may be all of it.

    Raises:
        LabError: no run in the store is of such a task or norm, or there is no such status.
    """
    if status not in (None, *STATUSES):
        raise unknown("status", status, STATUSES)
    found = list(runs)
    for kind, wanted in (("task", task), ("norm", norm)):
        there = {_of(run, kind) for run in found}
        if wanted is not None and found and wanted not in there:
            raise unknown(kind, wanted, sorted(there), "in this store")
    asked = {"task": task, "norm": norm, "status": status}
    return [run for run in found if all(wanted in (None, _of(run, kind)) for kind, wanted in asked.items())]


def _of(run: Run, kind: str) -> str:
    return run.status if kind == "status" else str(run.identity[kind])


def version(run: Run) -> str:
    """What makes runs of one task those of one version: equal for these, and different for others."""
    return to_json([run.identity[name] for name in WHAT], sort_keys=True)


def versions_of(runs: Iterable[Run]) -> tuple[dict[str, str], str]:
    """By key the version of each run of a task, numbered from 1 as they were first stored, and what differs."""
    firsts: dict[str, Run] = {}
    for run in runs:
        firsts.setdefault(version(run), run)
    numbers = {one: str(number) for number, one in enumerate(firsts, 1)}
    differing = [words for name, words in WHAT.items() if len({to_json(r.identity[name]) for r in firsts.values()}) > 1]
    return {run.key: numbers[version(run)] for run in runs}, " and ".join(differing)


def versions(runs: Sequence[Run]) -> tuple[dict[str, str], list[str]]:
    """By key the version of each run, numbered within its task as they were first stored, and a sentence for each task
    with more than one: what differs. The number is "" for tasks with one."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run.identity["task"], []).append(run)
    numbers: dict[str, str] = {}
    sentences: list[str] = []
    for task, of_task in found.items():
        own, differing = versions_of(of_task)
        firsts = list({own[run.key]: run for run in reversed(of_task)}.values())[::-1]
        numbers |= own if len(firsts) > 1 else dict.fromkeys(own, "")
        if len(firsts) > 1:
            since = ", ".join(f"{number} from {run.finished}" for number, run in enumerate(firsts, 1))
            sentences.append(
                f"{task}: {len(firsts)} versions, which differ in {differing} ({since}, UTC); "
                "`normwise runs show KEY` has each in full"
            )
    return numbers, sentences


def find(store: Store, prefix: str) -> Run:
    """The run whose key begins with ``prefix``, with its series.

    Raises:
        LabError: there is none, or more than one.
    """
    keys = [key for key in sorted(store.keys()) if key.startswith(prefix)]
    if len(keys) != 1:
        found = f"{len(keys)} runs ({', '.join(key[:12] for key in keys[:3])}, ..)" if keys else "no run"
        raise LabError(f"{prefix!r} is the beginning of the key of {found}; `normwise runs list` shows the keys")
    return store.runs(keys)[0]


def head(run: Run) -> dict[str, Any]:
    """A run without its series, flat: its key, what it is, how it ended."""
    return {
        "key": run.key,
        **{name: run.identity[name] for name in SETTINGS},
        "status": run.status,
        "reason": run.reason,
        "machine": run.machine,
        "finished": run.finished,
    }


def one_a_run(runs: Iterable[Run]) -> Table:
    """A row a run; ``settings`` and the last value of each series, by name, are JSON."""
    for run in runs:
        last = {name: curve.values[-1] for name, curve in run.series.items() if curve.values}
        yield {
            **head(run),
            "settings": to_json(run.identity["settings"], sort_keys=True),
            "source": run.identity["source"],
            **{name: str(run.identity[name]) for name in VERSIONS},
            "last_values": to_json(last),
        }


def one_a_value(store: Store, runs: Iterable[Run]) -> Table:
    """A row for every value of every series; NaN where it was not finite."""
    for listed in runs:
        (run,) = store.runs([listed.key])
        about = {name: value for name, value in head(run).items() if name in VALUE_COLUMNS}
        for name, curve in run.series.items():
            for step, value in zip(curve.steps, curve.values, strict=True):
                yield {**about, "series": name, "step": step, "value": value}


def write_csv(rows: Table, columns: Sequence[str], path: Path) -> int:
    """Returns how many rows were written. The file is there only when it is whole."""
    with _whole(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        count = 0
        for row in rows:
            writer.writerow(row)
            count += 1
    return count


def write_parquet(rows: Table, columns: Sequence[str], path: Path) -> int:
    """As ``write_csv``, with pyarrow (the extra ``normwise[parquet]``)."""
    import pyarrow
    import pyarrow.parquet

    kinds: dict[str, Callable[[], Any]] = {
        **dict.fromkeys(("batch_size", "seed", "steps", "step"), pyarrow.int64),
        **dict.fromkeys(("learning_rate", "value"), pyarrow.float64),
    }
    schema = pyarrow.schema([(name, kinds.get(name, pyarrow.string)()) for name in columns])
    count = 0
    with _whole(path) as partial, pyarrow.parquet.ParquetWriter(partial, schema) as writer:
        for part in _parts(rows):
            writer.write_table(pyarrow.Table.from_pylist(part, schema))
            count += len(part)
    return count


def _parts(rows: Table) -> Iterator[list[dict[str, Any]]]:
    part: list[dict[str, Any]] = []
    for row in rows:
        part.append(row)
        if len(part) == ROWS_AT_ONCE:
            yield part
            part = []
    if part:
        yield part


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A place to write beside ``path``, which takes its name when all is written, and vanishes otherwise.

    Raises:
        LabError: it cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        raise LabError(
            f"{path} cannot be written ({error.strerror or error}): give another file, or free some space"
        ) from error
    finally:
        partial.unlink(missing_ok=True)
