"""What a task is: one network on one data set, that can be built with any of several norms.

A task is a frozen dataclass whose fields are its hyperparameters; they are part of what identifies a run.
It is one small file: see ``mlp.py`` and ``examples/custom_task.py``.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from normwise.lab.errors import LabError
from normwise.measure.saturation import NONLINEARITIES, is_saturated

SATURATED: Mapping[type[nn.Module], Callable[[Tensor], Tensor]] = {
    kind: functools.partial(is_saturated, nonlinearity=name) for kind, name in NONLINEARITIES.items()
}


IGNORED = -100
"""The target of a position that is padding: neither loss nor accuracy counts it. torch's own ``ignore_index``."""


@dataclass(frozen=True)
class Batch:
    """Cases of a data set: inputs (N, ...), targets (N,), and for padded sequences (N, T, ...) the lengths (N,).

    Targets are the numbers of classes, as integers; ``IGNORED`` (-100) marks positions that do not count.
    """

    inputs: Tensor
    targets: Tensor
    lengths: Tensor | None = None

    def __len__(self) -> int:
        return len(self.inputs)

    def select(self, index: Tensor | slice) -> Batch:
        """The cases at ``index``; of sequences, the padding that none of them needs is cut off."""
        inputs, targets = self.inputs[index], self.targets[index]
        if self.lengths is None:
            return Batch(inputs, targets)
        lengths = self.lengths[index]
        return Batch(inputs[:, : int(lengths.max())], targets, lengths)


@dataclass(frozen=True)
class Task(ABC):
    """One network on one data set. A subclass gives class variables, ``data`` and ``model``; the rest has defaults.

    Its fields are hyperparameters. One that only says where data lie has ``metadata={"place": True}``, and
    ``fingerprint`` then says what they are: data may move, and nothing is trained again.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    """One sentence for the report: network, data, optimiser."""
    norms: ClassVar[tuple[str, ...]] = ("none", "batch", "layer", "group", "rms")
    more_norms: ClassVar[tuple[str, ...]] = ()
    """Norms that can be asked for by name and are no default."""
    batch_sizes: ClassVar[tuple[int, ...]] = (64, 8, 2)
    learning_rates: ClassVar[tuple[float, ...]] = (0.01, 0.05)
    """The grid that every norm is offered; which one counts is decided by the training loss (``lab/score.py``)."""
    steps: ClassVar[int] = 200
    clip: ClassVar[float | None] = None
    """The largest norm that the gradient of all parameters together may have; larger ones are scaled down to it."""
    looks: ClassVar[int] = 6
    """How often the held-out probe is looked at, beside the look after the last step."""
    looks_apart: ClassVar[int] = 1
    """The fewest steps between two looks, where a look costs as much as many steps."""
    probe_cases: ClassVar[int] = 200
    """How many held-out cases are in that probe."""
    watched: ClassVar[str | None] = None
    """Dotted name of the module whose input's percentiles are recorded; None records none."""
    saturated: ClassVar[Mapping[type[nn.Module], Callable[[Tensor], Tensor]]] = SATURATED
    """For each kind of nonlinearity, which of its inputs count as saturated."""

    @abstractmethod
    def data(self) -> tuple[Batch, Batch]:
        """The cases to train on and the cases held out, always the same ones."""

    @abstractmethod
    def model(self, norm: str, seed: int) -> nn.Module:
        """The network with ``norm``. The weights must depend on the seed and not on the norm, so that runs are paired.

        Raises:
            UndefinedError: the norm has no meaning in this network.
        """

    def optimizer(self, model: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
        """SGD with momentum 0.9."""
        return torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=0.9, fused=True)

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """The scores (N, classes). A task on sequences passes ``batch.lengths`` on here."""
        scores: Tensor = model(batch.inputs)
        return scores

    def loss(self, scores: Tensor, batch: Batch) -> Tensor:
        """The mean cross-entropy, in nats."""
        return nn.functional.cross_entropy(scores, batch.targets)

    def watch(self, values: Tensor) -> Tensor:
        """The one pre-activation to follow, out of the watched module's input (N, C, ...): channel 0, all positions."""
        return values[:, 0]

    def series(self, model: nn.Module, batch: Batch) -> dict[str, float]:
        """More numbers to record, by name, each time the held-out probe is looked at. ``model`` is in eval mode."""
        return {}

    def derived(self, loss: float) -> dict[str, float]:
        """Numbers that follow from a mean loss on held-out cases, by name: recorded wherever that loss is."""
        return {}

    def rate_factor(self, step: int, steps: int) -> float:
        """What the learning rate is multiplied by at update ``step`` of ``steps``: warm-up, decay."""
        return 1.0

    def at_end(self, model: nn.Module, batch_size: int, seed: int) -> Mapping[str, float]:
        """Numbers to record after all others, as "final/NAME": what the trained ``model`` does in another mode, after
        recalibration or fine-tuning. It may be changed at will."""
        return {}

    def parts(self) -> Mapping[str, Batch]:
        """More held-out cases, by name, whose loss and accuracy at the end are recorded on their own."""
        return {}

    def over_time(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        """For sequences: squared sizes, by name, (N, T) for each case and time step; beyond its length anything.

        Recorded at the start and at the end of the training, with ``model`` in train mode and in eval mode.
        """
        return {}

    def batches(self, batch_size: int, steps: int, seed: int) -> Iterator[Batch]:
        """``steps`` batches: the training cases in a new order each epoch, its last incomplete batch left out."""
        train, _ = self.cases
        if not 1 <= batch_size <= len(train):
            raise LabError(
                f"batch size {batch_size} is not in 1..{len(train)}, the training cases of task {self.name!r}"
            )
        order = torch.Generator().manual_seed(seed)
        per_epoch = len(train) // batch_size
        for step in range(steps):
            if step % per_epoch == 0:
                permutation = torch.randperm(len(train), generator=order)
            start = step % per_epoch * batch_size
            yield train.select(permutation[start : start + batch_size])

    @functools.cached_property
    def cases(self) -> tuple[Batch, Batch]:
        """``data()``, made once.

        Raises:
            LabError: it is no pair of batches, or one has no cases or not as many inputs as targets and lengths, or its
                targets are no classes.
        """
        made = self.data()
        if not (isinstance(made, tuple) and len(made) == 2 and all(isinstance(part, Batch) for part in made)):
            found = type(made).__name__
            if isinstance(made, (tuple, list)):
                found += f" of ({', '.join(type(part).__name__ for part in made)})"
            raise LabError(
                f"data() of task {self.name!r} returned {found}, expected a tuple of two "
                "batches, to train on and held out: return Batch(inputs, targets), Batch(inputs, targets)"
            )
        for part, which in zip(made, ("to train on", "held out"), strict=True):
            counts = {
                field.name: len(value)
                for field in dataclasses.fields(part)
                if (value := getattr(part, field.name)) is not None
            }
            if len(set(counts.values())) != 1 or not len(part):
                found = ", ".join(f"{count} {name}" for name, count in counts.items())
                raise LabError(
                    f"the cases {which} of task {self.name!r} have {found}: expected equally many, and at least 1"
                )
            if part.targets.is_floating_point() or part.targets.is_complex():
                raise LabError(
                    f"the targets {which} of task {self.name!r} are of {part.targets.dtype}: expected the numbers of "
                    "classes, as int64 (targets.long()), since norms are compared by accuracy. To compare them on "
                    "numbers (regression) sort these into classes, such as quartiles"
                )
        return made

    @property
    def fingerprint(self) -> str | None:
        """The sha256 of data that a user gave; None for data that ship with the task."""
        return None

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """The hyperparameters by name, as plain numbers, strings and lists, and the fingerprint as "data"."""
        places = {field.name for field in dataclasses.fields(self) if field.metadata.get("place")}
        values = {
            name: self._setting(name, value) for name, value in dataclasses.asdict(self).items() if name not in places
        }
        return values if self.fingerprint is None else {**values, "data": self.fingerprint}

    def _setting(self, name: str, value: Any) -> Any:
        """``value`` as JSON can hold it, infinities and NaN by their names: they tell runs apart as numbers do."""
        if value is None or isinstance(value, (str, bool, int)):
            return value
        if isinstance(value, float):
            return value if math.isfinite(value) else str(value)
        if isinstance(value, (list, tuple)):
            return [self._setting(name, part) for part in value]
        if isinstance(value, dict):
            return {str(key): self._setting(name, part) for key, part in value.items()}
        raise LabError(
            f"the hyperparameter {name!r} of task {self.name!r} is of type {type(value).__name__}, but it is part of "
            'what identifies a run: expected numbers, strings, lists and dicts (or field(metadata={"place": True}))'
        )
