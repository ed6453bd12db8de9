"""Digits with a small residual conv net."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from normwise.lab.datasets import load_mnist_5k
from normwise.lab.norms import image_norm
from normwise.lab.tasks.base import Batch, Task

# Mean and standard deviation of MNIST's grey levels, from 0 to 1.
MEAN, STD = 0.1307, 0.3081


class Residual(nn.Module):
    """relu(norm(conv(relu(norm(conv(x))))) + shortcut(x)), He et al. 2016; its output has ``size`` pixels a side."""

    def __init__(self, channels_in: int, channels: int, size: int, norm: str) -> None:
        super().__init__()
        same = channels_in == channels
        stride = 1 if same else 2
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.norm1 = image_norm(norm, channels, size, size)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = image_norm(norm, channels, size, size)
        self.relu2 = nn.ReLU()
        self.shortcut = nn.Identity() if same else nn.Conv2d(channels_in, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.norm1(self.conv1(x)))
        out: Tensor = self.relu2(self.norm2(self.conv2(y)) + self.shortcut(x))
        return out


@dataclass(frozen=True)
class Cnn(Task):
    """A stem (28 to 14 pixels a side), two residual blocks (14, then 7), one linear map; He's initial weights."""

    name: ClassVar[str] = "cnn"
    summary: ClassVar[str] = (
        "residual conv net (stem and two blocks, 8 to 16 channels) on digits (mnist_5k); "
        "He's initial weights, SGD with momentum 0.9"
    )
    norms: ClassVar[tuple[str, ...]] = ("none", "batch", "layer", "group", "instance", "rms")
    more_norms: ClassVar[tuple[str, ...]] = ("layer-plain",)
    learning_rates: ClassVar[tuple[float, ...]] = (0.005, 0.03)
    steps: ClassVar[int] = 100
    watched: ClassVar[str] = "block2.relu1"

    width: int = 8

    def data(self) -> tuple[Batch, Batch]:
        train, held_out = (
            Batch(((part.images / 255 - MEAN) / STD).unsqueeze(1), part.labels) for part in load_mnist_5k()
        )
        return train, held_out

    def model(self, norm: str, seed: int) -> nn.Module:
        weights = torch.Generator().manual_seed(seed)
        net = nn.Sequential()
        net.add_module("conv", nn.Conv2d(1, self.width, 3, stride=2, padding=1, bias=False))
        net.add_module("norm", image_norm(norm, self.width, 14, 14))
        net.add_module("relu", nn.ReLU())
        net.add_module("block1", Residual(self.width, self.width, 14, norm))
        net.add_module("block2", Residual(self.width, 2 * self.width, 7, norm))
        net.add_module("flatten", nn.Flatten())
        net.add_module("linear", nn.Linear(2 * self.width * 7 * 7, 10))
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=weights)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01, generator=weights)
                nn.init.zeros_(module.bias)
        return net
