"""Speakers with an LSTM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

import normwise
from normwise.lab.tasks.recurrent import RecurrentTask
from normwise.lab.tasks.vowels import ON_VOWELS


@dataclass(frozen=True)
class Lstm(RecurrentTask):
    """normwise.LSTM; the forget gates start open, at a bias of 1."""

    name: ClassVar[str] = "lstm"
    summary: ClassVar[str] = (
        f"LSTM, scores from its last state, {ON_VOWELS}; orthogonal recurrent weights, forget bias 1, Adam"
    )
    cell: ClassVar[type[normwise.LSTM]] = normwise.LSTM
    learning_rates: ClassVar[tuple[float, ...]] = (0.01, 0.03)
    steps: ClassVar[int] = 100

    def start(self, layer: normwise.RNN | normwise.LSTM) -> None:
        with torch.no_grad():
            layer.get_parameter("bias_ih_l0")[self.hidden : 2 * self.hidden] = 1
