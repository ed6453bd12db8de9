"""Which of a store's runs belong on one page: those of one version, and of one length of training a batch size."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from normwise.lab.claim import Judged, judge
from normwise.lab.claims import claims
from normwise.lab.errors import LabError, unknown
from normwise.lab.norms import NORMS
from normwise.lab.score import Row, score
from normwise.lab.store import Run, Store
from normwise.lab.strict_json import to_json
from normwise.lab.tasks import BUILT_IN, Task

VERSION = ("settings", "source", "lab", "normwise", "torch", "backend")


@dataclass(frozen=True)
class Study:
    """What a store says: rows for the tables and figures, tasks by name (None for one whose code is not at hand), and
    all claims, judged by its runs. ``left_out`` counts the runs that are not drawn; ``references`` has, for the user's
    tasks by their names, what they were called by."""

    rows: list[Row]
    tasks: dict[str, Task | None]
    judged: list[Judged]
    left_out: int
    references: dict[str, str]


def study(store: Store, tasks: Sequence[str] = ()) -> Study:
    """All that the page shows, or of it no more than ``tasks``, without the claims.

    Of runs of one task under several versions (of its code, the lab, normwise, torch) the version with most runs
    counts; of several lengths at one batch size the figures show the one with most runs, and of these the longest.
    Claims are judged by all runs of that version.

    Raises:
        LabError: the store has no runs, or none of one of the tasks.
    """
    index = store.index()
    if not index:
        raise LabError(f"{store.path} has no runs yet; `normwise claims --out {store.path.parent}` makes some")
    by_task = _by_task(index)
    for name in tasks:
        if name not in by_task:
            raise unknown("task in this store", name, sorted(by_task))
    index = [run for name, runs in by_task.items() for run in runs if name in (tasks or by_task)]
    current = [run for runs in _by_task(index).values() for run in _most(runs, _version)]
    drawn = [run for runs in _by_task(current).values() for run in _of_one_length(runs)]
    whole = {run.key: run for run in store.runs(run.key for run in current)}
    names = list(dict.fromkeys(run.identity["task"] for run in drawn))
    names.sort(key=lambda name: _place(name, list(BUILT_IN)))
    drawn.sort(key=_order)
    called_by = store.references()
    used = {run.identity["seed"] for run in current}
    first, seeds = min(used), 1 + max(used) - min(used)
    asked = [] if tasks else claims().values()
    judged = [judge(claim, whole.values(), seeds, first_seed=first) for claim in asked]
    return Study(
        rows=score(whole[run.key] for run in drawn),
        tasks={name: _task(name, drawn) for name in names},
        judged=judged,
        left_out=len(index) - len(drawn),
        references={
            run.identity["task"]: called_by[run.identity["source"]]
            for run in drawn
            if run.identity["source"] in called_by
        },
    )


def _task(name: str, runs: Sequence[Run]) -> Task | None:
    """The built-in task of this name, if the runs are of its own settings: a text of the user's is not at hand here."""
    task = BUILT_IN[name]() if name in BUILT_IN else None
    settings = next(run.identity["settings"] for run in runs if run.identity["task"] == name)
    return task if task is not None and json.loads(to_json(task.settings)) == settings else None


def _by_task(runs: Iterable[Run]) -> dict[str, list[Run]]:
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run.identity["task"], []).append(run)
    return found


def _version(run: Run) -> str:
    return to_json([run.identity[name] for name in VERSION], sort_keys=True)


def _most(runs: Sequence[Run], kind: object) -> list[Run]:
    """The runs of the kind of which there are most; of several such, the one stored last."""
    assert callable(kind)
    counts = Counter(map(kind, runs))
    last = {kind(run): place for place, run in enumerate(runs)}
    best = max(counts, key=lambda one: (counts[one], last[one]))
    return [run for run in runs if kind(run) == best]


def _of_one_length(runs: Sequence[Run]) -> list[Run]:
    counts = Counter((run.identity["batch_size"], run.identity["steps"]) for run in runs)
    best = {
        size: max((count, steps) for (other, steps), count in counts.items() if other == size)[1] for size, _ in counts
    }
    return [run for run in runs if run.identity["steps"] == best[run.identity["batch_size"]]]


def _order(run: Run) -> tuple[int, str, int, int, str]:
    one = run.identity
    return (*_place(one["task"], list(BUILT_IN)), -one["batch_size"], *_place(one["norm"], list(NORMS)))


def _place(name: str, known: list[str]) -> tuple[int, str]:
    return (known.index(name) if name in known else len(known), name)
