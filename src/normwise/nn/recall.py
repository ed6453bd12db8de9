"""What a forward used besides its input, for the second forward that activation checkpointing runs on that input."""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

import torch
from torch import Tensor

from normwise.ops import running

T = TypeVar("T")

# How many forwards may wait for their backward.
KEPT = 16


class Recall(Generic[T]):
    """A value for each of the last batches, found again by the batch's mean."""

    def __init__(self) -> None:
        self._kept: deque[tuple[Tensor, T]] = deque(maxlen=KEPT)

    def keep(self, mean: Tensor, value: T) -> None:
        """`value` belongs to the batch with this mean."""
        if running.may_read(mean):
            self._kept.append((mean, value))

    def find(self, mean: Tensor, layer: str) -> T:
        """The value of the batch with this mean; RuntimeError, in the name of `layer`, if it is not there."""
        for kept, value in reversed(self._kept):
            if torch.allclose(kept, mean, rtol=1e-3, atol=1e-6, equal_nan=True):
                return value
        raise RuntimeError(
            f"{layer} was run again inside a backward (activation checkpointing) on a batch that is none of the last "
            f"{KEPT} it has seen in training: run the backward sooner after its forward, or leave this layer outside "
            "the checkpoint"
        )
