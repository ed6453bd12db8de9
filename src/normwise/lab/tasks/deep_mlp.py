"""Ten layers of ReLUs without shortcuts: what a large learning rate breaks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from normwise.lab.tasks.relu_mlp import ReluMlp


@dataclass(frozen=True)
class DeepMlp(ReluMlp):
    """``ReluMlp`` with ten hidden layers."""

    name: ClassVar[str] = "deep-mlp"
    summary: ClassVar[str] = (
        "784, ten layers of 100 ReLUs, 10, without shortcuts, on digits (mnist_5k); He's initial weights, SGD with "
        "momentum 0.9"
    )
    steps: ClassVar[int] = 400
    looks_apart: ClassVar[int] = 1_000_000  # the end alone

    depth: int = 10
