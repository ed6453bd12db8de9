"""The papers' experiments at their size, on the user's own files."""

from __future__ import annotations

from pathlib import Path

from normwise.lab.errors import LabError, unknown
from normwise.lab.spec import Spec, expand
from normwise.lab.tasks import PAPERS, load_task
from normwise.lab.tasks.on_idx import OnIdx


def reference(paper: str, data: Path) -> str:
    """What ``load_task`` takes.

    Raises:
        LabError: there is no such set-up.
    """
    if paper not in PAPERS:
        raise unknown("set-up", paper, PAPERS)
    return f"{paper}@{data.absolute()}"


def specs(paper: str, data: Path, *, seeds: int, steps: int | None = None, quick: bool = False) -> list[Spec]:
    """All runs of a set-up: as many updates as the paper makes at each batch size, or ``steps`` or the task's few.

    Raises:
        LabError: no such set-up; a file is missing, broken or too small.
    """
    name = reference(paper, data)
    task = load_task(name).task
    assert isinstance(task, OnIdx)
    if steps is not None and quick:
        raise LabError("--quick and --steps both say how long to train; give one of them")
    few = task.quick_steps if quick else steps
    return [
        spec
        for size in task.batch_sizes
        for spec in expand(name, seeds=seeds, batch_sizes=[size], steps=few or task.paper_steps(size))
    ]
