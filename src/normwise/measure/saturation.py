"""Saturation: inputs at which a nonlinearity or a gate passes next to no gradient, and units that never pass any."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# An input beyond it is saturated: sigmoid'(6) = 0.0025; tanh(x) = 2 sigmoid(2x) - 1, so |x| > 3 is the same place; a
# ReLU passes no gradient below 0.
THRESHOLDS = {"sigmoid": 6.0, "tanh": 3.0, "relu": 0.0}
NONLINEARITIES: dict[type[nn.Module], str] = {
    nn.Sigmoid: "sigmoid",
    nn.Tanh: "tanh",
    nn.ReLU: "relu",
    nn.ReLU6: "relu",
}


def nonlinearity_of(module: nn.Module) -> str | None:
    """Its name in `THRESHOLDS`; None where saturation is not defined."""
    return next((name for kind, name in NONLINEARITIES.items() if isinstance(module, kind)), None)


def is_saturated(x: Tensor, nonlinearity: str) -> Tensor:
    """Which inputs of a "sigmoid", "tanh" or "relu" are saturated; bool, the shape of `x`."""
    threshold = THRESHOLDS[nonlinearity]
    return x <= threshold if nonlinearity == "relu" else x.abs() > threshold


class Saturation:
    """The share of saturated inputs over batches and calls, and the dead units: those whose every input is saturated.

    Attributes:
        saturated, inputs: how many there were.
        dead: (units,) bool; empty where no call said which axis holds the units.
    """

    def __init__(self) -> None:
        self.saturated = self.inputs = 0
        self.dead = torch.zeros(0, dtype=torch.bool)

    @property
    def share(self) -> float:
        """0 where there were no inputs."""
        return self.saturated / max(1, self.inputs)

    def add(self, saturated: Tensor, unit_axis: int | None = None) -> None:
        """One call, of which these inputs were saturated."""
        self.saturated += int(saturated.sum())
        self.inputs += saturated.numel()
        if unit_axis is not None and saturated.numel():
            dead = saturated.movedim(unit_axis, 0).flatten(1).all(1) if saturated.dim() > 1 else saturated
            dead = dead.cpu()
            self.dead = self.dead & dead if len(self.dead) == len(dead) else dead
