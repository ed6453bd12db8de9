"""`normwise.diagnose`: what normalization does in a model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from normwise.diagnosis.batches import Loss
from normwise.diagnosis.collect import collect
from normwise.diagnosis.records import Diagnosis


def diagnose(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    loss: Loss,
    optimizer: torch.optim.Optimizer | None = None,
    max_batches: int = 8,
) -> Diagnosis:
    """Look at a model on a few batches."""
    return collect(model, batches, loss, optimizer, max_batches)
