"""What determines a run, and the sweep of runs that a request asks for."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import normwise
from normwise import measure
from normwise.lab.errors import LabError, unknown
from normwise.lab.strict_json import to_json
from normwise.lab.tasks import load_task

COMPUTES = ("run.py", "watch.py", "shift.py", "norms.py", "datasets.py", "idx.py", "tasks/base.py")
"""The lab's files that every run's numbers come from, besides those of its task; a test knows if one is missing."""

MEASURES = ("axes.py", "gradients.py", "saturation.py", "shift.py", "snapshot.py", "time_steps.py")
"""The files of `normwise.measure` that these call, directly or not; a test knows if one is missing."""

_FILES = [*(Path(__file__).parent / name for name in COMPUTES), *(Path(measure.__file__).parent / n for n in MEASURES)]
LAB_REVISION = hashlib.sha256(b"".join(file.read_bytes() for file in _FILES)).hexdigest()
"""Changes with any of these files: a run that older code has stored is not taken for one of this code."""


@dataclass(frozen=True)
class Spec:
    """One run: train ``task`` with ``norm`` for ``steps`` batches. Plain values, so that it can cross to a worker."""

    task: str
    norm: str
    batch_size: int
    learning_rate: float
    seed: int
    steps: int

    def identity(self) -> dict[str, Any]:
        """Everything that determines the run's numbers on one machine.

        That is the spec; the task's hyperparameters and the sha256 of the file that defines it and of the modules
        that it imports from its own folder (`user_file.modules`; their place does not count, so a moved folder trains
        nothing again), and of data of the user's; the sha256 of the files that compute and measure every run;
        the versions of normwise and torch, since both compute; and a backend forced by NORMWISE_BACKEND, since
        backends round differently. The machine is left out: a store carried to another machine is still good, and
        runs there may differ by rounding.
        """
        task, source = load_task(self.task)
        return {
            **asdict(self),
            "task": task.name,
            "settings": task.settings,
            "source": source,
            "lab": LAB_REVISION,
            "normwise": normwise.__version__,
            "torch": torch.__version__,
            "backend": os.environ.get("NORMWISE_BACKEND", "auto"),
        }

    def key(self) -> str:
        """The sha256 of the identity as JSON with sorted keys."""
        canonical = to_json(self.identity(), sort_keys=True, compact=True)
        return hashlib.sha256(canonical.encode()).hexdigest()


def expand(
    task: str,
    *,
    seeds: int,
    norms: Sequence[str] | None = None,
    batch_sizes: Sequence[int] | None = None,
    learning_rates: Sequence[float] | None = None,
    steps: int | None = None,
) -> list[Spec]:
    """All runs of one task; what is None is the task's own default.

    Raises:
        LabError: an unknown task or norm, an empty list, or a number out of range.
    """
    defaults = load_task(task).task
    norms = defaults.norms if norms is None else norms
    batch_sizes = defaults.batch_sizes if batch_sizes is None else batch_sizes
    learning_rates = defaults.learning_rates if learning_rates is None else learning_rates
    steps = defaults.steps if steps is None else steps
    for norm in norms:
        known = (*defaults.norms, *defaults.more_norms)
        if norm not in known:
            raise unknown("norm", norm, known, f"for task {defaults.name!r}")
    cases = len(defaults.cases[0])
    for batch_size in batch_sizes:
        if not 1 <= batch_size <= cases:
            raise LabError(f"batch size {batch_size} is not in 1..{cases}, the training cases of {defaults.name!r}")
    for rate in learning_rates:
        if not 0 < rate < float("inf"):
            raise LabError(f"learning rate {rate} is not a positive finite number")
    for name, number in (("seeds", seeds), ("steps", steps)):
        if number < 1:
            raise LabError(f"{name} is {number}, expected at least 1")
    runs = [
        Spec(task, norm, batch_size, rate, seed, steps)
        for batch_size in dict.fromkeys(batch_sizes)
        for norm in dict.fromkeys(norms)
        for rate in dict.fromkeys(learning_rates)
        for seed in range(seeds)
    ]
    if not runs:
        raise LabError("nothing to run: a list of norms, batch sizes or learning rates is empty")
    return runs
