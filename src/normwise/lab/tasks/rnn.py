"""Speakers with a plain tanh RNN."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import normwise
from normwise.lab.tasks.recurrent import RecurrentTask
from normwise.lab.tasks.vowels import ON_VOWELS


@dataclass(frozen=True)
class Rnn(RecurrentTask):
    """normwise.RNN with tanh."""

    name: ClassVar[str] = "rnn"
    summary: ClassVar[str] = f"tanh RNN, scores from its last state, {ON_VOWELS}; orthogonal recurrent weights, Adam"
    cell: ClassVar[type[normwise.RNN]] = normwise.RNN
    learning_rates: ClassVar[tuple[float, ...]] = (0.01, 0.03)
    steps: ClassVar[int] = 150
