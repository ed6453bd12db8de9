"""How far a run is, in one file beside the store: a long one can be stopped and goes on to the same bits."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from normwise.lab.errors import LabError

if TYPE_CHECKING:
    from normwise.lab.run import Result

SECONDS = 30.0
"""A run is written down about this often, and so loses at most as much when it is killed."""


def checkpoint_of(key: str, folder: Path) -> Path:
    """The file of the run ``key``: what determines the run is in its name."""
    return folder / f"{key}.pt"


def save(path: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, result: Result) -> None:
    """Write everything that the rest of the run depends on, ``step`` updates being done. The file is whole at any time.

    Raises:
        LabError: it cannot be written, as on a full disk; the one that was there stays.
    """
    state = {
        "step": step,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "random": torch.get_rng_state(),
        "series": {name: [series.steps, series.values] for name, series in result.series.items()},
    }
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, partial)
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:
        partial.unlink(missing_ok=True)
        raise LabError(f"{path} cannot be written ({error}). Free some space, or give another --out") from error


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, result: Result) -> tuple[int, torch.Tensor]:
    """Put model, optimizer and result back; returns the updates done and torch's random state then.

    Raises:
        LabError: the file is damaged.
    """
    try:
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        for name, (steps, values) in state["series"].items():
            for step, value in zip(steps, values, strict=True):
                result.record(step, {name: value})
        return int(state["step"]), state["random"]
    except Exception as error:  # torch.load raises whatever the rubbish leads it to
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise LabError(f"{path} is damaged ({reason}). Delete it, and the run starts from its beginning") from error
