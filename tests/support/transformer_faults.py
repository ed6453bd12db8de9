"""The faulty models and near twins of the findings about transformers; see `faults`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from support.transformer_nets import GPT, MultiHead, sentences

cross_entropy = nn.functional.cross_entropy
Arguments = dict[str, Any]


def of_tokens(model: nn.Module) -> Arguments:
    return {"model": model, "batches": sentences(), "loss": cross_entropy}


def nw018(faulty: bool) -> Arguments:
    """One feature of every token 60 times the others; the twin's is twice."""
    model = GPT(width=64)
    with torch.no_grad():
        model.tokens.weight[:, 5] += 60.0 if faulty else 2.0
    return of_tokens(model)


def nw018_massive(faulty: bool) -> Arguments:
    """A massive activation: two features, of one token alone. In the twin all features of that token are as large."""
    model = GPT(width=64)
    with torch.no_grad():
        model.positions[0, [3, 9] if faulty else slice(None)] += 400.0
    return of_tokens(model)


def nw019(faulty: bool) -> Arguments:
    """Branches that see the stream as it is double it; behind a norm they add the same each time."""
    return of_tokens(GPT(blocks=10, norm=nn.RMSNorm if not faulty else lambda width: nn.Identity(), scale=8.0))


def nw020(faulty: bool) -> Arguments:
    """Queries and keys that are far too large; the twin's pass a norm."""
    model = GPT(qk_norm=not faulty)
    with torch.no_grad():
        for block in model.blocks:
            block.attention.qkv.weight[:64] *= 25.0
    return of_tokens(model)


def nw020_multi_head(faulty: bool, *, need_weights: bool) -> Arguments:
    model = MultiHead(need_weights=need_weights)
    with torch.no_grad():
        model.attention.in_proj_weight[:32] *= 25.0 if faulty else 1.0
    data = [(torch.randn(16, 12, 16), torch.randint(4, (16,))) for _ in range(2)]
    return {"model": model, "batches": data, "loss": cross_entropy}


class OfSize(nn.Module):
    """A norm whose input is of a certain size, around a certain mean."""

    def __init__(self, norm: nn.Module, size: float, mean: float = 0.0) -> None:
        super().__init__()
        self.norm, self.head = norm, nn.Linear(6, 3)
        self.size, self.mean = size, mean

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x.clamp(-2, 2) * self.size + self.mean))


def nw021(faulty: bool) -> Arguments:
    data = [(torch.randn(32, 6), torch.randint(3, (32,))) for _ in range(2)]
    return {"model": OfSize(nn.RMSNorm(6), 200.0 if faulty else 100.0), "batches": data, "loss": cross_entropy}


def nw021_mean(faulty: bool) -> Arguments:
    """A LayerNorm squares what is left without the mean: the twin's norm takes 10,000 away before."""
    data = [(torch.randn(32, 6), torch.randint(3, (32,))) for _ in range(2)]
    norm = nn.RMSNorm(6) if faulty else nn.LayerNorm(6)
    return {"model": OfSize(norm, 50.0, 10_000.0), "batches": data, "loss": cross_entropy}


TRANSFORMER_FAULTS: dict[str, Callable[[bool], Arguments]] = {
    "NW018": nw018,
    "NW018 massive": nw018_massive,
    "NW019": nw019,
    "NW020": nw020,
    "NW020 weights": lambda faulty: nw020_multi_head(faulty, need_weights=True),
    "NW020 no weights": lambda faulty: nw020_multi_head(faulty, need_weights=False),
    "NW021": nw021,
    "NW021 mean": nw021_mean,
}
