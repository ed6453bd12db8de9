"""Saturated and dead units of nonlinearities, and of gates."""

from __future__ import annotations

import torch
from torch import Tensor

from normwise.diagnosis.distributions import Layout
from normwise.diagnosis.records import Units


def saturated(x: Tensor, nonlinearity: str, threshold: float) -> Tensor:
    """Which inputs of a "sigmoid", "tanh" or "relu" pass (next to) no gradient."""
    return x <= threshold if nonlinearity == "relu" else x.abs() > threshold


class UnitWatch:
    """One nonlinearity over all batches and calls."""

    def __init__(self, nonlinearity: str, threshold: float) -> None:
        self.nonlinearity, self.threshold = nonlinearity, threshold
        self.saturated = self.seen = 0
        self.dead: Tensor | None = None

    @torch.no_grad()
    def add(self, x: Tensor, layout: Layout) -> None:
        flat = saturated(x.detach(), self.nonlinearity, self.threshold)
        self.saturated += int(flat.sum())
        self.seen += flat.numel()
        if layout.feature is not None and flat.numel():
            dead = flat.movedim(layout.feature, 0).reshape(flat.shape[layout.feature], -1).all(1).cpu()
            self.dead = dead if self.dead is None or len(self.dead) != len(dead) else self.dead & dead

    def record(self) -> Units:
        dead = torch.zeros(0, dtype=torch.bool) if self.dead is None else self.dead
        return Units(
            self.nonlinearity,
            self.threshold,
            self.saturated / max(1, self.seen),
            len(dead),
            float(dead.double().mean()) if len(dead) else 0.0,
            torch.nonzero(dead).flatten().tolist()[:32],
        )
