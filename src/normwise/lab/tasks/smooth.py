"""The loss along its gradient, on the way through a training (Santurkar et al. 2018, section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from normwise.lab.tasks.base import Batch
from normwise.lab.tasks.deep_mlp import DeepMlp
from normwise.measure.snapshot import dry_run


@dataclass(frozen=True)
class Smooth(DeepMlp):
    """``DeepMlp``, of whose loss in train mode each look takes, on the held-out probe, the range and how far the
    gradient g changes at the weights w - eta * g: for eta up to ``reach``, the same for every norm, and for steps of
    up to ``relative`` times the length of w, whatever g's length is.
    """

    name: ClassVar[str] = "smooth"
    summary: ClassVar[str] = (
        "the net, data and optimiser of deep-mlp, of whose loss each look takes a walk along the gradient"
    )
    norms: ClassVar[tuple[str, ...]] = ("none", "batch")
    learning_rates: ClassVar[tuple[float, ...]] = (0.01,)
    steps: ClassVar[int] = 300
    looks: ClassVar[int] = 10
    looks_apart: ClassVar[int] = 1

    reach: float = 0.4
    relative: float = 0.02
    points: int = 8

    def series(self, model: nn.Module, batch: Batch) -> dict[str, float]:
        """ "along/loss", the range in nats, and "along/gradient", the largest ||g' - g||, up to ``reach``; and
        "along/relative-loss" and "along/relative-gradient", ||g' - g|| / ||g||, up to ``relative``."""
        parameters = list(model.parameters())
        start = [parameter.detach().clone() for parameter in parameters]
        with dry_run(model, training=True):
            loss, gradient = self._at(model, batch)
            size = _length(gradient)
            walks = {"": (self.reach, 1.0), "relative-": (self.relative * _length(start) / size, size)}
            found = {}
            for name, (longest, unit) in walks.items():
                losses, changes = [loss], []
                for point in range(1, self.points + 1):
                    _set(parameters, start, gradient, -longest * point / self.points)
                    there, other = self._at(model, batch)
                    losses.append(there)
                    changes.append(_length([b - a for a, b in zip(gradient, other, strict=True)]) / unit)
                found[f"along/{name}loss"] = max(losses) - min(losses)
                found[f"along/{name}gradient"] = max(changes)
            _set(parameters, start, gradient, 0.0)
        return found

    def _at(self, model: nn.Module, batch: Batch) -> tuple[float, Sequence[Tensor]]:
        with torch.enable_grad():
            loss = self.loss(self.forward(model, batch), batch)
            return loss.item(), torch.autograd.grad(loss, list(model.parameters()))


def _length(parts: Sequence[Tensor]) -> float:
    return float(torch.stack([part.square().sum() for part in parts]).sum().sqrt())


def _set(parameters: Sequence[Tensor], start: Sequence[Tensor], direction: Sequence[Tensor], factor: float) -> None:
    for parameter, at, along in zip(parameters, start, direction, strict=True):
        parameter.copy_(at if not factor else at + factor * along)
