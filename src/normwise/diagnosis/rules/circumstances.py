"""What is known of a task before anything is measured, and which findings that lets one foresee."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from normwise.diagnosis.rules.signals import DEEP
from normwise.diagnosis.rules.statistics import FEWEST_VALUES, LOCAL_SAMPLES
from normwise.words import counted

Kind = Literal["conv", "mlp", "recurrent", "transformer"]


@dataclass(frozen=True)
class Circumstances:
    """A task, as far as it bears on the choice of a norm.

    Attributes:
        kind: of the net.
        batch_size: samples a step on one rank; None where nobody said.
        ranks: processes that train together.
        padded: sequences of different lengths, padded.
        layers: how many layers with weights; None where nobody said.
        longer: at use there may be longer sequences than in training.
    """

    kind: Kind
    batch_size: int | None = None
    ranks: int = 1
    padded: bool = False
    layers: int | None = None
    longer: bool = False


def few_samples(task: Circumstances) -> str | None:
    if task.batch_size is None or task.batch_size >= FEWEST_VALUES:
        return None
    if task.batch_size == 1:
        return "at batch size 1 a feature has one value, and no deviation"
    return f"at batch size {task.batch_size} mean and variance come from few samples and vary from batch to batch"


def few_on_a_rank(task: Circumstances) -> str | None:
    if task.ranks < 2 or task.batch_size is None or task.batch_size >= LOCAL_SAMPLES:
        return None
    return f"each of the {task.ranks} ranks takes its own statistics, of {counted(task.batch_size, 'sample')}"


def padding(task: Circumstances) -> str | None:
    return "the padding of sequences of different lengths enters its statistics" if task.padded else None


def recurrence(task: Circumstances) -> str | None:
    if task.kind != "recurrent":
        return None
    longer = ", and steps beyond those of training have none" if task.longer else ""
    return f"inside a recurrence it needs running statistics for each time step{longer}"


def deep(task: Circumstances) -> str | None:
    if task.kind == "recurrent":
        return "a recurrent net is as deep as its sequences are long"
    if task.layers is not None and task.layers >= DEEP:
        return f"over as many as {task.layers} layers with weights signals and gradients shrink or grow"
    return None


def growing(task: Circumstances) -> str | None:
    return "the summed inputs drift with the time step" if task.kind == "recurrent" else None
