"""Speakers with a small transformer encoder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normwise.lab.norms import sequence_norm
from normwise.lab.tasks.base import Batch
from normwise.lab.tasks.vowels import COEFFICIENTS, ON_VOWELS, SPEAKERS, Vowels


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)): the norm stands before, as in most of today's nets.

    With ``causal`` a position attends to itself and those before it.
    """

    def __init__(self, width: int, heads: int, norm: str, *, causal: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.norm1 = sequence_norm(norm, width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = sequence_norm(norm, width)
        self.up = nn.Linear(width, 4 * width)
        self.relu = nn.ReLU()
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        parts = self.qkv(self.norm1(x, valid)).unflatten(-1, (3, self.heads, -1))
        queries, keys, values = parts.permute(2, 0, 3, 1, 4)
        mask = valid[:, None, None]
        if self.causal:
            mask = mask & torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        seen = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        y: Tensor = x + self.down(self.relu(self.up(self.norm2(x, valid))))
        return y


class Encoder(nn.Module):
    """Frames, their places as sines (Vaswani et al. 2017), blocks, a last norm, the mean over the valid frames."""

    def __init__(self, width: int, heads: int, blocks: int, norm: str) -> None:
        super().__init__()
        self.embed = nn.Linear(COEFFICIENTS, width)
        self.blocks = nn.ModuleList(Block(width, heads, norm) for _ in range(blocks))
        self.norm = sequence_norm(norm, width)
        self.linear = nn.Linear(width, SPEAKERS)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        valid = torch.arange(x.shape[1]) < lengths[:, None]
        x = self.embed(x)
        x = x + places(*x.shape[1:])
        for block in self.blocks:
            x = block(x, valid)
        x = self.norm(x, valid).masked_fill(~valid[..., None], 0)
        scores: Tensor = self.linear(x.sum(1) / lengths[:, None])
        return scores


def places(steps: int, width: int) -> Tensor:
    """(T, width): sines and cosines of the step, of wavelengths from 2 pi to 10000 * 2 pi; defined for any T."""
    rates = torch.exp(torch.arange(0, width, 2) * (-math.log(10000) / width))
    angles = torch.arange(steps)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)


@dataclass(frozen=True)
class Transformer(Vowels):
    """Two blocks of width 32 with 4 heads. Attention and the mean never see the padding; "batch" does."""

    name: ClassVar[str] = "transformer"
    summary: ClassVar[str] = (
        f"transformer encoder (two blocks, norms first), scores from the mean over the frames, {ON_VOWELS}; Adam"
    )
    norms: ClassVar[tuple[str, ...]] = ("none", "batch", "batch-masked", "layer", "rms")
    more_norms: ClassVar[tuple[str, ...]] = ("layer-plain", "dyt", "dyt-1", "dyt-2", "derf")
    learning_rates: ClassVar[tuple[float, ...]] = (0.003, 0.01)
    steps: ClassVar[int] = 150
    watched: ClassVar[str] = "blocks.1.relu"

    width: int = 32
    heads: int = 4
    blocks: int = 2

    def model(self, norm: str, seed: int) -> nn.Module:
        model = Encoder(self.width, self.heads, self.blocks, norm)
        draws = torch.Generator().manual_seed(seed)
        for module in model.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, generator=draws)
                nn.init.zeros_(module.bias)
        return model

    def watch(self, values: Tensor) -> Tensor:
        """Feature 0 at every position, padding included."""
        return values[..., 0]

    def over_time(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        """Of each case and position:

        - "summed": mean square of what the last block's ReLU sees;
        - "gradient": squared norm of the gradient of the case's own loss with respect to the embedded frame.
        """
        assert isinstance(model, Encoder)
        kept: dict[str, Tensor] = {}
        relu = model.get_submodule(f"blocks.{self.blocks - 1}.relu")
        hooks = [
            model.embed.register_forward_hook(lambda module, args, out: kept.update(embedded=out)),
            relu.register_forward_pre_hook(lambda module, args: kept.update(summed=args[0])),
        ]
        try:
            with torch.enable_grad():
                loss = self.loss(self.forward(model, batch), batch) * len(batch)
                (gradient,) = torch.autograd.grad(loss, kept["embedded"])
        finally:
            for hook in hooks:
                hook.remove()
        return {"summed": kept["summed"].detach().square().mean(-1), "gradient": gradient.square().sum(-1)}
