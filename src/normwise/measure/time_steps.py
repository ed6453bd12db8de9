"""Quantities per time step, over batches of sequences of different lengths."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from normwise.backends.reference.recurrence import Step

# What one or two long sequences do is no mean.
FEWEST_SEQUENCES = 5


class StepMeans:
    """The mean at each time step over the sequences that are still running there, in float64."""

    def __init__(self) -> None:
        self.total = torch.zeros(0, dtype=torch.float64)
        self.count = torch.zeros(0, dtype=torch.float64)

    def add(self, values: Tensor, valid: Tensor) -> None:
        """One batch: a number (T, N) for each step and sequence, and which of them count, bool (T, N)."""
        self.add_sums(torch.where(valid, values.detach().double(), 0).sum(1), valid.sum(1))

    def add_sums(self, total: Tensor, count: Tensor) -> None:
        """One batch: the sum over its sequences at each step, and how many they are, (T,)."""
        steps = max(len(self.total), len(total))
        self.total, self.count = (
            F.pad(a, (0, steps - len(a))) + F.pad(b.double().cpu(), (0, steps - len(b)))
            for a, b in ((self.total, total), (self.count, count))
        )

    def mean(self) -> Tensor:
        """(T,)"""
        return self.total / self.count.clamp(min=1)

    def overall(self) -> float:
        """The mean over all steps, each sequence's step with the same weight."""
        return float(self.total.sum() / self.count.sum().clamp(min=1))

    def steps(self) -> int:
        """How many steps at least `FEWEST_SEQUENCES` sequences reach, or all where there are fewer from the start."""
        return int((self.count >= min(FEWEST_SEQUENCES, float(self.count[0]))).sum()) if len(self.count) else 0


def gate_inputs(tape: Sequence[Step], gate: int) -> Tensor:
    """(T, B, H): what went into one gate's sigmoid or tanh at each step, in the order of `GATES`."""
    return torch.stack([step.gates[gate].detach() for step in tape])


def summed_inputs(tape: Sequence[Step]) -> Tensor:
    """(T, B, G*H): what the gates see at each step, after norms and biases.

    Where the candidate of a GRU has no such sum, it is what goes into the nonlinearities.
    """
    return torch.stack([torch.cat(step.gates, -1) if step.summed is None else step.summed for step in tape]).detach()
