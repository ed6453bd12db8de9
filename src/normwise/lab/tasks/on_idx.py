"""What the set-ups of the papers share: a user's folder of IDX files, and test cases that are looked at on the way."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from normwise.lab.errors import LabError
from normwise.lab.idx import Folder, load_folder
from normwise.lab.tasks.base import Batch, Task

CHUNK = 500


@dataclass(frozen=True)
class OnIdx(Task, ABC):
    """A set-up of a paper on the images of MNIST, or on others of the same shape, in the folder ``path``.

    ``quick_steps`` are those of a short run. The images are whole, 28 x 28, with ten classes.
    """

    quick_steps: ClassVar[int]
    looks: ClassVar[int] = 100
    looks_apart: ClassVar[int] = 20
    probe_cases: ClassVar[int] = 1500
    curve_cases: ClassVar[int] = 10_000
    """How many of the test cases, the first ones, the curves over the steps are of; the final numbers are of all."""

    path: str = field(default="", metadata={"place": True})

    @abstractmethod
    def inputs(self, images: Tensor) -> Tensor:
        """What the network gets, from grey levels (N, 28, 28) of 0 to 255."""

    def paper_steps(self, batch_size: int) -> int:
        """How many updates the paper makes at this batch size."""
        return self.steps

    @functools.cached_property
    def folder(self) -> Folder:
        """The files, read once."""
        if not self.path:
            raise LabError(f"{self.name} needs a folder of IDX files: normwise reproduce {self.name} --data DIR")
        return load_folder(Path(self.path))

    @property
    def fingerprint(self) -> str:
        return self.folder.sha256

    def data(self) -> tuple[Batch, Batch]:
        train, test = (Batch(self.inputs(part.images), part.labels) for part in self.folder[:2])
        return train, test

    def series(self, model: nn.Module, batch: Batch) -> dict[str, float]:
        """ "test/loss", the mean negative log-likelihood in nats, and "test/accuracy"."""
        test = self.cases[1].select(slice(0, self.curve_cases))
        scores = torch.cat(
            [self.forward(model, test.select(slice(at, at + CHUNK))) for at in range(0, len(test), CHUNK)]
        )
        right = (scores.argmax(-1) == test.targets).double().mean()
        return {"test/loss": float(self.loss(scores, test)), "test/accuracy": float(right)}
