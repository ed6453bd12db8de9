"""Text in pieces of different lengths, padded, with a small causal transformer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normwise.lab.tasks.base import IGNORED, Batch
from normwise.lab.tasks.charlm_transformer import CausalTransformer, CharLmTransformer


class PaddedTransformer(CausalTransformer):
    """Inputs below zero are padding. It is embedded as character 0, and no valid position attends to it."""

    def forward(self, numbers: Tensor) -> Tensor:
        return self.scores(numbers.clamp(min=0), numbers >= 0)


@dataclass(frozen=True)
class CharLmRagged(CharLmTransformer):
    """Four blocks of width 32. Each piece keeps its first ``shortest`` to ``length`` characters, drawn once and alike
    for every run; the rest is padding, at the end, which enters neither loss nor accuracy. "batch" takes its
    statistics over all positions, "batch-masked" over the valid ones."""

    name: ClassVar[str] = "charlm-ragged"
    summary: ClassVar[str] = (
        "causal transformer (four blocks, norms first) that predicts the next character of a text (default: the topics "
        "of Python's own help) in pieces of 8 to 64, padded; the last tenth of the text is held out; Adam"
    )
    norms: ClassVar[tuple[str, ...]] = ("none", "batch", "batch-masked", "layer", "rms")

    width: int = 32
    blocks: int = 4
    shortest: int = 8

    def model(self, norm: str, seed: int) -> nn.Module:
        return self.initialized(
            PaddedTransformer(len(self.characters), self.width, self.heads, self.blocks, norm), seed
        )

    def pieces(self, numbers: Tensor) -> Batch:
        whole = super().pieces(numbers)
        draws = torch.Generator().manual_seed(0)
        lengths = torch.randint(self.shortest, self.length + 1, (len(whole), 1), generator=draws)
        padding = torch.arange(self.length) >= lengths
        return Batch(whole.inputs.masked_fill(padding, IGNORED), whole.targets.masked_fill(padding, IGNORED))

    def loss(self, scores: Tensor, batch: Batch) -> Tensor:
        """The mean cross-entropy over the valid characters, in nats."""
        return F.cross_entropy(scores.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORED)
