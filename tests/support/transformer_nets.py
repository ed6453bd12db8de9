"""Small transformers, written as people write them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SelfAttention(nn.Module):
    """Heads by scaled_dot_product_attention, or by a softmax that is written out."""

    def __init__(
        self, width: int, heads: int, *, causal: bool, qk_norm: bool = False, written_out: bool = False
    ) -> None:
        super().__init__()
        self.heads, self.causal, self.written_out = heads, causal, written_out
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        norm = (lambda: nn.RMSNorm(width // heads)) if qk_norm else nn.Identity
        self.q_norm, self.k_norm = norm(), norm()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        q, k = self.q_norm(q), self.k_norm(k)
        if self.written_out:
            y = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(
        self, width: int, attention: nn.Module, norm: Callable[[int], nn.Module] = nn.RMSNorm, scale: float = 1.0
    ) -> None:
        super().__init__()
        self.norm1, self.attention = norm(width), attention
        self.norm2, self.up, self.down = norm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.scale * self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """A causal language model over 50 tokens; its output is as cross_entropy wants it, (N, tokens, T)."""

    def __init__(
        self,
        width: int = 32,
        heads: int = 4,
        blocks: int = 4,
        norm: Callable[[int], nn.Module] = nn.RMSNorm,
        scale: float = 1.0,
        **attention: bool,
    ) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(50, width), nn.Parameter(0.02 * torch.randn(64, width))
        self.blocks = nn.ModuleList(
            Block(width, SelfAttention(width, heads, **{"causal": True, **attention}), norm, scale)
            for _ in range(blocks)
        )
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, 50, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)).transpose(1, 2)


class ViT(nn.Module):
    """Patches, a class token, pre-norm blocks in a Sequential, as timm has them."""

    def __init__(self, width: int = 32, blocks: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.cls, self.positions = nn.Parameter(torch.zeros(1, 1, width)), nn.Parameter(0.02 * torch.randn(10, width))
        self.blocks = nn.Sequential(
            *(Block(width, SelfAttention(width, 4, causal=False), nn.LayerNorm) for _ in range(blocks))
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).mT
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])


class Encoder(nn.Module):
    """torch's own encoder over padded tokens."""

    def __init__(self, *, norm_first: bool = False, width: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, width, padding_idx=0)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.linear = nn.Linear(width, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        padding = tokens == 0
        y = self.encoder(self.embedding(tokens), src_key_padding_mask=padding)
        return self.linear(y.masked_fill(padding[..., None], 0).sum(1) / (~padding).sum(1, keepdim=True))


class MultiHead(nn.Module):
    """One nn.MultiheadAttention that is asked for its weights or not."""

    def __init__(self, width: int = 16, *, need_weights: bool) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(width), nn.MultiheadAttention(width, 4, batch_first=True)
        self.head, self.need_weights = nn.Linear(width, 4), need_weights

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.head((x + self.attention(y, y, y, need_weights=self.need_weights)[0]).mean(1))


def sentences(samples: int = 16, steps: int = 20, count: int = 2) -> list:
    """Tokens and the next ones."""
    return [(t[:, :-1], t[:, 1:]) for t in (torch.randint(50, (samples, steps + 1)) for _ in range(count))]
