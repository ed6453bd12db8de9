"""The same digits with new random labels again and again: whether a net can still learn (Kumar et al. 2023)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from normwise.lab.datasets import load_mnist_5k
from normwise.lab.tasks.base import Batch
from normwise.lab.tasks.relu_mlp import ReluMlp, standardized

CHOSEN_BY = 19980705  # the same digits for every seed


@dataclass(frozen=True)
class Plasticity(ReluMlp):
    """``digits`` digits of 14 x 14 pixels, means of four each. Every ``task_steps`` updates all labels are drawn anew;
    weights and optimizer go on.
    """

    name: ClassVar[str] = "plasticity"
    summary: ClassVar[str] = (
        "196-100-100-10 with ReLUs on 1,200 digits (mnist_5k, 14 x 14) whose labels are random, and drawn anew every "
        "400 updates; He's initial weights, Adam"
    )
    norms: ClassVar[tuple[str, ...]] = ("none", "layer")
    batch_sizes: ClassVar[tuple[int, ...]] = (48,)
    learning_rates: ClassVar[tuple[float, ...]] = (0.001, 0.003)
    steps: ClassVar[int] = 20_000
    looks_apart: ClassVar[int] = 1_000_000

    depth: int = 2
    digits: int = 1200
    task_steps: int = 400
    decay: float = 0.0

    def data(self) -> tuple[Batch, Batch]:
        train, held_out = load_mnist_5k()
        chosen = torch.randperm(len(train.images), generator=torch.Generator().manual_seed(CHOSEN_BY))[: self.digits]
        # Of the labels only their number counts: each task draws its own.
        return (
            Batch(_of_four(standardized(train.images[chosen])), train.labels[chosen]),
            Batch(_of_four(standardized(held_out.images)), held_out.labels),
        )

    def optimizer(self, model: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
        """Adam; with ``decay`` AdamW."""
        return torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=self.decay, fused=True)

    def batches(self, batch_size: int, steps: int, seed: int) -> Iterator[Batch]:
        """The digits in a new order each epoch; a new task begins an epoch."""
        draws = torch.Generator().manual_seed(seed)
        inputs = self.cases[0].inputs
        for step in range(steps):
            of_task = step % self.task_steps
            if of_task == 0:
                targets = torch.randint(10, (len(inputs),), generator=draws)
            at = of_task % (len(inputs) // batch_size)
            if at == 0:
                order = torch.randperm(len(inputs), generator=draws)
            part = order[at * batch_size : (at + 1) * batch_size]
            yield Batch(inputs[part], targets[part])


@dataclass(frozen=True)
class PlasticityDecay(Plasticity):
    """The same with decoupled weight decay, by which a weight halves in about 1,400 updates at a rate of 0.001."""

    name: ClassVar[str] = "plasticity-decay"
    summary: ClassVar[str] = "the net and data of plasticity, trained by AdamW with decay 0.5"

    decay: float = 0.5


def _of_four(inputs: Tensor) -> Tensor:
    """Means over 2 x 2 pixels: (N, 784) to (N, 196)."""
    return nn.functional.avg_pool2d(inputs.view(-1, 1, 28, 28), 2).flatten(1)
