"""Dropout before BatchNorm, and behind all of them (Li et al. 2018)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from normwise.lab.tasks.relu_mlp import ReluMlp


@dataclass(frozen=True)
class DropoutBeforeBn(ReluMlp):
    """Dropout behind every ReLU, so before every BatchNorm but the first. At the end also with running statistics
    re-estimated without dropout.
    """

    name: ClassVar[str] = "dropout-before-bn"
    summary: ClassVar[str] = (
        "784, four layers of 100 ReLUs, 10, dropout of one half behind each, on digits (mnist_5k); He's initial "
        "weights, SGD with momentum 0.9"
    )
    norms: ClassVar[tuple[str, ...]] = ("batch",)
    steps: ClassVar[int] = 500
    looks_apart: ClassVar[int] = 1_000_000

    depth: int = 4
    dropout: float = 0.5

    def after_relu(self, layer: int) -> nn.Module | None:
        return nn.Dropout(self.dropout)

    def at_end(self, model: nn.Module, batch_size: int, seed: int) -> Mapping[str, float]:
        return self.recalibrated(model)


@dataclass(frozen=True)
class DropoutAfterBn(DropoutBeforeBn):
    """The same net with the last dropout alone, behind all BatchNorms."""

    name: ClassVar[str] = "dropout-after-bn"
    summary: ClassVar[str] = "the net, data and optimiser of dropout-before-bn, with the last of its dropouts alone"

    def after_relu(self, layer: int) -> nn.Module | None:
        return nn.Dropout(self.dropout) if layer == self.depth else None
