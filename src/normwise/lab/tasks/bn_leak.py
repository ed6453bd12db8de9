"""Groups of one class, half of whose pictures are black: what BatchNorm tells a case of its batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

import normwise
from normwise.lab.errors import LabError
from normwise.lab.tasks.base import Batch
from normwise.lab.tasks.relu_mlp import ReluMlp, standardized

CLASSES = 10


@dataclass(frozen=True)
class BnLeak(ReluMlp):
    """Every ``group`` cases of a batch are of one class, and all classes come equally often. "batch" takes its
    statistics over each group (``virtual_batch_size``), as every GPU does of its share of the batch.

    The pictures of the last ``black`` cases of a group are black: of their class their own picture says nothing, and
    the others of the group all. Without black ones there would be little to read, since the mean of a group of one
    class, which BatchNorm takes away, is what tells the class.
    """

    name: ClassVar[str] = "bn-leak"
    summary: ClassVar[str] = (
        "784-100-100-100-10 with ReLUs on digits (mnist_5k) in groups of 8 of one class, 4 of them black, over "
        "which BatchNorm takes its statistics; He's initial weights, SGD with momentum 0.9"
    )
    norms: ClassVar[tuple[str, ...]] = ("batch", "layer", "group")
    batch_sizes: ClassVar[tuple[int, ...]] = (80,)
    steps: ClassVar[int] = 300
    looks_apart: ClassVar[int] = 1_000_000

    group: int = 8
    black: int = 4

    def norm(self, name: str) -> nn.Module:
        if name == "batch":
            return normwise.BatchNorm1d(self.width, virtual_batch_size=self.group)
        return super().norm(name)

    def batches(self, batch_size: int, steps: int, seed: int) -> Iterator[Batch]:
        """As many cases of each class in a batch, group by group; each class in a new order each epoch."""
        order = torch.Generator().manual_seed(seed)
        done = 0
        while done < steps:
            for batch in self.grouped(self.cases[0], batch_size, order)[: steps - done]:
                yield batch
                done += 1

    def grouped(self, cases: Batch, batch_size: int, order: torch.Generator) -> list[Batch]:
        """All of ``cases``, but for what is left over, in batches of whole groups.

        Raises:
            LabError: a batch size that is not of as many groups for each class.
        """
        if batch_size % (CLASSES * self.group):
            raise LabError(
                f"batch size {batch_size} is not a multiple of {CLASSES * self.group}: task {self.name!r} needs groups "
                f"of {self.group} cases of each of {CLASSES} classes"
            )
        a_class = batch_size // CLASSES
        mixed = [_mixed(torch.nonzero(cases.targets == label)[:, 0], order) for label in range(CLASSES)]
        whole = min(map(len, mixed)) // a_class
        return [
            self.blackened(cases.select(torch.cat([one[at * a_class : (at + 1) * a_class] for one in mixed])))
            for at in range(whole)
        ]

    def blackened(self, batch: Batch) -> Batch:
        """With the last pictures of each group black."""
        groups = batch.inputs.unflatten(0, (-1, self.group)).clone()
        groups[:, self.group - self.black :] = standardized(torch.zeros(1, 28, 28))
        return Batch(groups.flatten(0, 1), batch.targets)

    def at_end(self, model: nn.Module, batch_size: int, seed: int) -> Mapping[str, float]:
        """Accuracy on held-out groups in both modes."""
        groups = self.grouped(self.cases[1], batch_size, torch.Generator().manual_seed(0))
        return {
            **self.held_out(model, groups, "train-mode", training=True),
            **self.held_out(model, groups, "eval-mode"),
        }


def _mixed(index: Tensor, order: torch.Generator) -> Tensor:
    return index[torch.randperm(len(index), generator=order)]
