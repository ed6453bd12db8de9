"""A high rate for half of the training, then none: how far running averages lag (Wu & Johnson 2021)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from normwise.lab.tasks.base import Batch
from normwise.lab.tasks.relu_mlp import ReluMlp


@dataclass(frozen=True)
class PreciseBn(ReluMlp):
    """The rate stays for half of the steps and falls to 0 on a line in the other half. At each look, the held-out loss
    by the running averages and, on a copy, by statistics re-estimated on the training cases.
    """

    name: ClassVar[str] = "precise-bn"
    summary: ClassVar[str] = (
        "784-100-100-100-10 with ReLUs and BatchNorm on digits (mnist_5k), the rate constant for half of the steps and "
        "then falling to 0; He's initial weights, SGD with momentum 0.9"
    )
    norms: ClassVar[tuple[str, ...]] = ("batch",)
    batch_sizes: ClassVar[tuple[int, ...]] = (32,)
    learning_rates: ClassVar[tuple[float, ...]] = (0.3,)
    steps: ClassVar[int] = 600
    looks: ClassVar[int] = 20

    def rate_factor(self, step: int, steps: int) -> float:
        return min(1.0, 2 * (1 - step / steps))

    def series(self, model: nn.Module, batch: Batch) -> dict[str, float]:
        """ "lag/running" and "lag/recalibrated": losses of all held-out cases, in nats."""
        running = self.held_out(model, [self.cases[1]], "running")["running/loss"]
        again = self.recalibrated(copy.deepcopy(model))["recalibrated/loss"]
        return {"lag/running": running, "lag/recalibrated": again}

    def at_end(self, model: nn.Module, batch_size: int, seed: int) -> Mapping[str, float]:
        return self.recalibrated(model)
