"""Models that surgery is done on, and what the tests of it share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from support.norm_cases import randomize


class Block(nn.Module):
    """A residual block, with a norm one level down."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.norm(self.conv(x)))


class Net(nn.Module):
    """BatchNorm at several depths, one of them standing in two places, and other norms."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 12, 3, bias=False), nn.BatchNorm2d(12, eps=1e-3, momentum=0.3))
        self.blocks = nn.ModuleList([Block(12), Block(12)])
        self.shared = self.stem[1]
        self.head = nn.Sequential(nn.Linear(12, 6), nn.BatchNorm1d(6), nn.LayerNorm(6), nn.Linear(6, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.shared(x).mean((2, 3)))


def net() -> Net:
    """A `Net` whose gains, biases and statistics are not those that layers start with."""
    return randomized(Net())


def randomized(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)):
            randomize(module)
    return model


def state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of everything that a model holds, modes included."""
    modes = {f"{name}.training": torch.tensor(module.training) for name, module in model.named_modules()}
    return {name: value.detach().clone() for name, value in model.state_dict().items()} | modes


def assert_same_state(model: nn.Module, before: dict[str, Tensor]) -> None:
    now = state(model)
    assert now.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(now[name], value), name


IMAGES = (4, 3, 8, 8)
