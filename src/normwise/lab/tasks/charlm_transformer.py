"""Text with a small causal transformer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from normwise.lab.norms import sequence_norm
from normwise.lab.tasks.charlm import ON_TEXT, CharLm
from normwise.lab.tasks.transformer import Block, places


class CausalTransformer(nn.Module):
    """Characters, their places as sines (Vaswani et al. 2017), blocks that see the past alone, a last norm, scores."""

    def __init__(self, characters: int, width: int, heads: int, blocks: int, norm: str) -> None:
        super().__init__()
        self.embed = nn.Embedding(characters, width)
        self.blocks = nn.ModuleList(Block(width, heads, norm, causal=True) for _ in range(blocks))
        self.norm = sequence_norm(norm, width)
        self.linear = nn.Linear(width, characters)

    def forward(self, numbers: Tensor) -> Tensor:
        return self.scores(numbers, torch.ones_like(numbers, dtype=torch.bool))

    def scores(self, numbers: Tensor, valid: Tensor) -> Tensor:
        """Of each position, given which of them are valid."""
        x = self.embed(numbers)
        x = x + places(*x.shape[1:])
        for block in self.blocks:
            x = block(x, valid)
        scores: Tensor = self.linear(self.norm(x, valid))
        return scores


@dataclass(frozen=True)
class CharLmTransformer(CharLm):
    """Two blocks with 4 heads. In train mode "batch" sees the whole piece, and so a little of the characters to come:
    its statistics are over all positions. In eval mode nothing does."""

    name: ClassVar[str] = "charlm-transformer"
    summary: ClassVar[str] = f"causal transformer (two blocks, norms first) {ON_TEXT}; Adam"
    norms: ClassVar[tuple[str, ...]] = ("none", "batch", "layer", "rms")
    more_norms: ClassVar[tuple[str, ...]] = ("layer-plain", "dyt", "dyt-1", "dyt-2", "derf")
    watched: ClassVar[str] = "blocks.1.relu"

    width: int = 48
    heads: int = 4
    blocks: int = 2

    def model(self, norm: str, seed: int) -> nn.Module:
        return self.initialized(
            CausalTransformer(len(self.characters), self.width, self.heads, self.blocks, norm), seed
        )

    def initialized(self, model: CausalTransformer, seed: int) -> nn.Module:
        """The same weights for every norm."""
        draws = torch.Generator().manual_seed(seed)
        nn.init.normal_(model.embed.weight, generator=draws)
        for module in model.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, generator=draws)
                nn.init.zeros_(module.bias)
        return model

    def watch(self, values: Tensor) -> Tensor:
        """Feature 0 at every position."""
        return values[..., 0]
