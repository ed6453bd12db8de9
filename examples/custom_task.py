"""A task of your own for the lab: which norm suits a small tanh net that tells speakers apart?

    normwise compare --task examples/custom_task.py:make_task --batch-sizes 32,4

A task says what the data are and how the network looks with a given norm. Everything else (training, the grid of
learning rates, recording, the table, the report) is the lab's. The fields of the dataclass are its hyperparameters:
change one, or anything else in this file, and the runs are trained anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from normwise.lab.datasets import Utterances, load_japanese_vowels
from normwise.lab.norms import feature_norm
from normwise.lab.tasks import Batch, Task


@dataclass(frozen=True)
class Speakers(Task):
    """Nine speakers from the first seven frames of an utterance, 12 numbers a frame."""

    name: ClassVar[str] = "speakers"
    summary: ClassVar[str] = "84-64-64-9 with tanh on the first seven frames of JapaneseVowels; SGD with momentum 0.9"
    norms: ClassVar[tuple[str, ...]] = ("none", "batch", "layer", "rms")
    batch_sizes: ClassVar[tuple[int, ...]] = (32, 4)
    learning_rates: ClassVar[tuple[float, ...]] = (0.01, 0.05, 0.25)
    steps: ClassVar[int] = 200
    watched: ClassVar[str] = "5"  # the second tanh, by its name in the Sequential below

    width: int = 64

    def data(self) -> tuple[Batch, Batch]:
        def part(utterances: Utterances) -> Batch:
            return Batch(utterances.frames[:, :7].flatten(1), utterances.speakers)

        train, held_out = load_japanese_vowels()
        return part(train), part(held_out)

    def model(self, norm: str, seed: int) -> nn.Module:
        torch.manual_seed(seed)  # the weights depend on the seed and not on the norm, so runs can be paired
        first, second, last = nn.Linear(84, self.width), nn.Linear(self.width, self.width), nn.Linear(self.width, 9)
        return nn.Sequential(
            first,
            feature_norm(norm, self.width),
            nn.Tanh(),
            second,
            feature_norm(norm, self.width),
            nn.Tanh(),
            last,
        )


def make_task() -> Task:
    """What `--task examples/custom_task.py:make_task` calls."""
    return Speakers()
