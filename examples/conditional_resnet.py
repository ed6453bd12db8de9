"""A residual block with class-conditional BatchNorm, as in the generators of SAGAN and BigGAN.

    python examples/conditional_resnet.py

The statistics are the batch's, the affine part is the class's: a table has a scale and a shift for every class and
channel, in place of the layer's own gain and bias (de Vries et al. 2017). Trained to draw two kinds of stripes from
noise of the same kind, only the table tells the block which of them is wanted.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import normwise


class ConditionalBatchNorm(nn.Module):
    """BatchNorm with the activation, and a scale and shift for each class."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.norm = normwise.BatchNorm2d(channels, affine=False, act="relu")
        self.table = nn.Embedding(classes, 2 * channels)
        nn.init.zeros_(self.table.weight)  # y = norm(x) * (1 + scale) + shift begins as the plain norm

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        scale, shift = self.table(label).chunk(2, dim=1)
        return self.norm(x, scale=scale, shift=shift)


class ResidualBlock(nn.Module):
    """x + conv(norm(conv(norm(x)))), with the class in both norms."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (ConditionalBatchNorm(channels, classes) for _ in range(2))
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        return x + self.conv2(self.norm2(self.conv1(self.norm1(x, label)), label))


class Generator(nn.Module):
    """Noise (N, 1, 8, 8) and a class to a picture (N, 1, 8, 8)."""

    def __init__(self, channels: int = 16, classes: int = 2) -> None:
        super().__init__()
        self.into = nn.Conv2d(3, channels, 3, padding=1)
        self.blocks = nn.ModuleList(ResidualBlock(channels, classes) for _ in range(2))
        self.out = nn.Conv2d(channels, 1, 3, padding=1)

    def forward(self, noise: Tensor, label: Tensor) -> Tensor:
        row = torch.linspace(-1, 1, 8)
        place = torch.stack(torch.meshgrid(row, row, indexing="ij")).expand(len(noise), 2, 8, 8)
        x = self.into(torch.cat([noise, place], 1))
        for block in self.blocks:
            x = block(x, label)
        return torch.tanh(self.out(x))


def main(steps: int = 150) -> tuple[float, float]:
    """Train, then draw in eval mode: (mean square error with the right class, with the other one)."""
    torch.manual_seed(0)
    stripes = torch.tensor([1.0, 1.0, -1.0, -1.0]).repeat(2)
    pictures = torch.stack([stripes.expand(8, 8), stripes[:, None].expand(8, 8)])[:, None]  # upright and level
    model = Generator()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        label = torch.randint(2, (32,))
        error = (model(0.1 * torch.randn(32, 1, 8, 8), label) - pictures[label]).square().mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
    model.eval()
    label = torch.arange(16) % 2
    with torch.no_grad():
        drawn = model(0.1 * torch.randn(16, 1, 8, 8), label)
    right, wrong = ((drawn - pictures[of]).square().mean().item() for of in (label, 1 - label))
    print(f"error of what was drawn: {right:.3f} against its class, {wrong:.3f} against the other")
    return right, wrong


if __name__ == "__main__":
    main()
