"""What several claims' set-ups share: digits as grey levels, and layers of ReLUs with a norm in front of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from normwise.lab.datasets import load_mnist_5k
from normwise.lab.norms import feature_norm
from normwise.lab.tasks.base import Batch, Task
from normwise.measure.snapshot import dry_run
from normwise.surgery import recalibrate

RECALIBRATED_BY = 200  # cases a batch

# Mean and standard deviation of MNIST's grey levels, from 0 to 1.
MEAN, STD = 0.1307, 0.3081


def standardized(images: Tensor) -> Tensor:
    """(N, 784) from grey levels (N, 28, 28) of 0 to 255."""
    return (images.flatten(1) / 255 - MEAN) / STD


@dataclass(frozen=True)
class ReluMlp(Task):
    """784, ``depth`` times ``width``, 10; norm between the affine map and the ReLU; He's initial weights."""

    name: ClassVar[str] = "relu-mlp"
    norms: ClassVar[tuple[str, ...]] = ("none", "batch", "layer", "group", "rms")
    batch_sizes: ClassVar[tuple[int, ...]] = (64,)
    learning_rates: ClassVar[tuple[float, ...]] = (0.01, 0.1)

    width: int = 100
    depth: int = 3

    def data(self) -> tuple[Batch, Batch]:
        train, held_out = (Batch(standardized(part.images), part.labels) for part in load_mnist_5k())
        return train, held_out

    def norm(self, name: str) -> nn.Module:
        """The norm of one hidden layer."""
        return feature_norm(name, self.width)

    def after_relu(self, layer: int) -> nn.Module | None:
        """What else stands behind the ReLU of hidden layer ``layer``, from 1."""
        return None

    def model(self, norm: str, seed: int) -> nn.Module:
        weights = torch.Generator().manual_seed(seed)
        net = nn.Sequential()
        features = len(self.cases[0].inputs[0])
        for layer in range(1, self.depth + 1):
            net.add_module(f"linear{layer}", nn.Linear(features, self.width))
            net.add_module(f"norm{layer}", self.norm(norm))
            net.add_module(f"relu{layer}", nn.ReLU())
            if (more := self.after_relu(layer)) is not None:
                net.add_module(f"after{layer}", more)
            features = self.width
        net.add_module("linear", nn.Linear(features, 10))
        for module in net.modules():
            if isinstance(module, nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=weights)
                nn.init.zeros_(module.bias)
        return net

    @torch.no_grad()
    def held_out(
        self, model: nn.Module, batches: Sequence[Batch], name: str, *, training: bool = False
    ) -> dict[str, float]:
        """ "NAME/loss" and "NAME/accuracy" over all cases of ``batches``; the model is left as it was."""
        with dry_run(model, training=training):
            scores = torch.cat([self.forward(model, batch) for batch in batches])
        together = Batch(scores, torch.cat([batch.targets for batch in batches]))
        right = (scores.argmax(-1) == together.targets).double().mean()
        return {f"{name}/loss": float(self.loss(scores, together)), f"{name}/accuracy": float(right)}

    def recalibrated(self, model: nn.Module) -> dict[str, float]:
        """``held_out`` by running statistics re-estimated on the training cases, which then stay.

        The cases are mixed as in training: they are stored class by class, and a deeper layer sees what its batch's
        own statistics have made of the layers before it. By batches of one class the loss came out 0.08 nats worse.
        """
        train, held_out = self.cases
        mixed = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
        recalibrate(model, train.inputs[mixed].split(RECALIBRATED_BY))
        return self.held_out(model, [held_out], "recalibrated")
