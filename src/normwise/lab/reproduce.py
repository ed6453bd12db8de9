"""The papers' experiments at their size, on the user's own files."""

from __future__ import annotations

from collections.abc import Sequence
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


def specs(
    paper: str,
    data: Path,
    *,
    seeds: int,
    norms: Sequence[str] | None = None,
    batch_sizes: Sequence[int] | None = None,
    steps: int | None = None,
    quick: bool = False,
) -> list[Spec]:
    """All runs of a set-up: as many updates as the paper makes at each batch size, or ``steps`` or the task's few.

    Norms and batch sizes are all of the paper's where they are None.

    Raises:
        LabError: no such set-up; a norm or batch size that is not the paper's; a file is missing, broken or too small.
    """
    name = reference(paper, data)
    task = load_task(name).task
    assert isinstance(task, OnIdx)
    if steps is not None and quick:
        raise LabError("--quick and --steps both say how long to train; give one of them")
    few = task.quick_steps if quick else steps
    sizes = task.batch_sizes if batch_sizes is None else tuple(dict.fromkeys(batch_sizes))
    for size in sizes:
        if size not in task.batch_sizes:
            known = " and ".join(map(str, task.batch_sizes))
            raise LabError(f"{paper} has no batch size {size}: the paper trains at {known}")
    return [
        spec
        for size in sizes
        for spec in expand(name, seeds=seeds, norms=norms, batch_sizes=[size], steps=few or task.paper_steps(size))
    ]
