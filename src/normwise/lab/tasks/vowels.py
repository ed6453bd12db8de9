"""What the tasks on JapaneseVowels share: the data, with held-out sequences that are longer than any in training."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from normwise.lab.datasets import Utterances, load_japanese_vowels
from normwise.lab.tasks.base import Batch, Task

SPEAKERS = 9
COEFFICIENTS = 12
ON_VOWELS = (
    "on utterances of different lengths (JapaneseVowels), trained on the first frames of each. Held-out utterances "
    "are whole: 'longer' are those of more frames than any in training, 'longer-cut' the same without these frames"
)


@dataclass(frozen=True)
class Vowels(Task):
    """Which of nine speakers says the vowels, from frames of 12 numbers, each standardized over the training frames.

    The set's own training utterances have up to 26 frames, and one alone of the 370 held out is longer. So that
    longer sequences than those of training are many, training has the first ``train_frames`` frames of each
    utterance: 125 held-out ones are longer than 16. They are a part of their own, "longer"; "longer-cut" is the same
    utterances without the frames that are too many, so that the difference is what these frames do.
    """

    batch_sizes: ClassVar[tuple[int, ...]] = (32, 4)

    train_frames: int = 16

    def data(self) -> tuple[Batch, Batch]:
        train, held_out = load_japanese_vowels()
        frames = train.frames[_valid(train)]
        std, mean = torch.std_mean(frames, dim=0, correction=0)

        def part(utterances: Utterances) -> Batch:
            standardized = (utterances.frames - mean) / std
            standardized[~_valid(utterances)] = 0
            return Batch(standardized, utterances.speakers, utterances.lengths)

        return first_frames(part(train), self.train_frames), part(held_out)

    def parts(self) -> Mapping[str, Batch]:
        _, held_out = self.cases
        assert held_out.lengths is not None
        longer = held_out.select(torch.nonzero(held_out.lengths > self.train_frames).flatten())
        return {"longer": longer, "longer-cut": first_frames(longer, self.train_frames)}

    def optimizer(self, model: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(model.parameters(), lr=learning_rate, fused=True)

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        scores: Tensor = model(batch.inputs, batch.lengths)
        return scores

    @functools.cached_property
    def longest(self) -> int:
        """Frames of the longest utterance in training."""
        train, _ = self.cases
        assert train.lengths is not None
        return int(train.lengths.max())


def first_frames(batch: Batch, frames: int) -> Batch:
    """At most the first ``frames`` frames of each case."""
    assert batch.lengths is not None
    return Batch(batch.inputs[:, :frames], batch.targets, batch.lengths.clamp(max=frames))


def _valid(utterances: Utterances) -> Tensor:
    """(N, T) bool: True where an utterance has a frame."""
    return torch.arange(utterances.frames.shape[1]) < utterances.lengths[:, None]
