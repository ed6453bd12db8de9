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
from normwise.lab.runs import version, versions_of
from normwise.lab.score import Row, score
from normwise.lab.store import Run, Store
from normwise.lab.strict_json import to_json
from normwise.lab.tasks import BUILT_IN, Task
from normwise.words import counted


@dataclass(frozen=True)
class Study:
    """What a store says: rows for the tables and figures, tasks by name (None for one whose code is not at hand), and
    all claims, judged by its runs. ``left_out`` counts the runs that are not drawn, and ``notes`` has, for tasks with
    such runs by their names, sentences on which these are; ``references`` has, for the user's tasks by their names,
    what they were called by."""

    rows: list[Row]
    tasks: dict[str, Task | None]
    judged: list[Judged]
    left_out: int
    notes: dict[str, list[str]]
    references: dict[str, str]


def study(store: Store, tasks: Sequence[str] = ()) -> Study:
    """All that the page shows, or of it no more than ``tasks``, without the claims.

    Of runs of one task under several versions (of its code, the lab, normwise, torch) the newest version counts, that
    of the run stored last: whoever edits a file and trains again wants to see what it is now. Of several lengths at one
    batch size the figures show the one with most runs, and of these the longest. Claims are judged by all runs of that
    version.

    Raises:
        LabError: the store has no runs, or none of one of the tasks.
    """
    index = store.index()
    if not index:
        raise LabError(f"{store.path} has no runs yet; `normwise claims --out {store.path.parent}` makes some")
    by_task = _by_task(index)
    for name in tasks:
        if name not in by_task:
            raise unknown("task", name, sorted(by_task), "in this store")
    index = [run for name, runs in by_task.items() for run in runs if name in (tasks or by_task)]
    current = [run for runs in _by_task(index).values() for run in _newest(runs)]
    drawn = [run for runs in _by_task(current).values() for run in _of_one_length(runs)]
    notes = {name: _notes(runs, current, drawn) for name, runs in _by_task(index).items()}
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
        notes={name: found for name, found in notes.items() if found},
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


def _newest(runs: Sequence[Run]) -> list[Run]:
    """The runs of the version whose run was stored last."""
    newest = version(runs[-1])
    return [run for run in runs if version(run) == newest]


def _notes(runs: Sequence[Run], current: Sequence[Run], drawn: Sequence[Run]) -> list[str]:
    """Sentences on the runs of a task that are not drawn, if there are any."""
    is_current, is_drawn = ({run.key for run in some} for some in (current, drawn))
    mine = [run for run in runs if run.key in is_current]
    others = len(runs) - len(mine)
    shorter = sum(run.key not in is_drawn for run in mine)
    notes = []
    if others:
        numbers, differing = versions_of(runs)
        count = len(set(numbers.values()))
        notes.append(
            f"Version {numbers[mine[-1].key]} of {count} is drawn, the newest, with {counted(len(mine), 'run')}; "
            f"{counted(others, 'run')} of {'the other' if count == 2 else 'the others'} "
            f"{'is' if others == 1 else 'are'} left out. They differ in {differing}; `normwise runs list` numbers them."
        )
    if shorter:
        notes.append(
            f"{counted(shorter, 'run')} {'is' if shorter == 1 else 'are'} left out: training was longer or shorter "
            "than in most runs of the same batch size."
        )
    return notes


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
