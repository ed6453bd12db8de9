"""A transformer block of a diffusion model (DiT) with adaLN-Zero: the noise level says how each norm scales and shifts.

    python examples/dit_block.py

A tiny diffusion transformer learns to tell the noise in short waves. Its LayerNorms have no parameters; scale, shift
and the gates of the residual branches come from the noise level (Peebles & Xie 2023, section 3.2), with zeros to begin
with, so that every block starts as the identity. In plain PyTorch it is norm(x) * (1 + scale[:, None]) +
shift[:, None]: without masks, and in bfloat16 with three roundings instead of one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

import normwise


class DiTBlock(nn.Module):
    """Attention and MLP, each with an adaptive LayerNorm before and a gate, 0 at first, behind."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = normwise.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm2 = normwise.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))
        self.adaptive = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        nn.init.zeros_(self.adaptive[1].weight)
        nn.init.zeros_(self.adaptive[1].bias)

    def forward(self, x: Tensor, condition: Tensor, mask: Tensor) -> Tensor:
        """(N, T, width), (N, width) and (N, T), True = valid."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaptive(condition).chunk(6, dim=1)
        y = self.norm1(x, scale=scale1, shift=shift1, mask=mask)
        x = x + gate1[:, None] * self.attention(y, y, y, key_padding_mask=~mask, need_weights=False)[0]
        y = self.norm2(x, scale=scale2, shift=shift2, mask=mask)
        return x + gate2[:, None] * self.mlp(y)


class Denoiser(nn.Module):
    """Predicts the noise in waves of different lengths."""

    def __init__(self, width: int = 32, depth: int = 2) -> None:
        super().__init__()
        self.width = width
        self.embed = nn.Linear(1, width)
        self.position = nn.Parameter(0.1 * torch.randn(24, width))
        self.level = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(DiTBlock(width, 4) for _ in range(depth))
        self.norm = normwise.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.adaptive = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, 1)

    def forward(self, noisy: Tensor, level: Tensor, mask: Tensor) -> Tensor:
        """(N, T), (N,) in [0, 1] and (N, T) -> (N, T)."""
        waves = level[:, None] * torch.arange(1, self.width // 2 + 1) * math.pi
        condition = self.level(torch.cat([waves.cos(), waves.sin()], 1))
        x = self.embed(noisy[..., None]) + self.position[: noisy.shape[1]]
        for block in self.blocks:
            x = block(x, condition, mask)
        shift, scale = self.adaptive(condition).chunk(2, dim=1)
        return self.head(self.norm(x, scale=scale, shift=shift, mask=mask)).squeeze(-1) * mask


def batch(size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Noisy waves, the noise in them, its level and what is no padding."""
    t = torch.arange(24) / 24
    clean = torch.sin(2 * math.pi * (torch.randint(1, 4, (size, 1)) * t + torch.rand(size, 1)))
    mask = torch.arange(24) < torch.randint(12, 25, (size, 1))
    level, noise = torch.rand(size), torch.randn(size, 24)
    angle = level[:, None] * math.pi / 2
    noisy = angle.cos() * clean + angle.sin() * noise
    # What stands in the padding must not matter: a large number.
    return noisy.masked_fill(~mask, 100.0), noise, level, mask


def main(steps: int = 200) -> tuple[float, float]:
    """Train: (mean square error per valid step at the beginning, at the end)."""
    torch.manual_seed(0)
    model = Denoiser()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    errors = []
    for _ in range(steps):
        noisy, noise, level, mask = batch(32)
        error = ((model(noisy, level, mask) - noise).square() * mask).sum() / mask.sum()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        errors.append(error.item())
    first, last = errors[0], sum(errors[-10:]) / 10
    print(f"error of the predicted noise: {first:.2f} at the beginning, {last:.2f} after {steps} steps")
    return first, last


if __name__ == "__main__":
    main()
