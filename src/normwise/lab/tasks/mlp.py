"""Digits with three hidden layers of sigmoids, the experiment of Ioffe & Szegedy 2015, section 4.1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from normwise.lab.datasets import load_mnist_5k
from normwise.lab.norms import feature_norm
from normwise.lab.tasks.base import Batch, Task


@dataclass(frozen=True)
class Mlp(Task):
    """784-100-100-100-10 on binary digits; norm between the affine map and the sigmoid; weights N(0, weight_std^2)."""

    name: ClassVar[str] = "mlp"
    summary: ClassVar[str] = (
        "784-100-100-100-10 with sigmoids on binary digits (mnist_5k), after Ioffe & Szegedy 2015, section 4.1; "
        "small Gaussian weights, SGD with momentum 0.9"
    )
    norms: ClassVar[tuple[str, ...]] = ("none", "batch", "layer", "group", "instance", "rms")
    more_norms: ClassVar[tuple[str, ...]] = ("layer-plain",)
    learning_rates: ClassVar[tuple[float, ...]] = (0.01, 0.1)
    steps: ClassVar[int] = 400
    watched: ClassVar[str] = "sigmoid3"

    width: int = 100
    weight_std: float = 0.1

    def data(self) -> tuple[Batch, Batch]:
        train, held_out = (Batch((part.images.flatten(1) > 127).float(), part.labels) for part in load_mnist_5k())
        return train, held_out

    def model(self, norm: str, seed: int) -> nn.Module:
        weights = torch.Generator().manual_seed(seed)
        net = nn.Sequential()
        features = 784
        for layer in range(1, 4):
            net.add_module(f"linear{layer}", nn.Linear(features, self.width))
            net.add_module(f"norm{layer}", feature_norm(norm, self.width))
            net.add_module(f"sigmoid{layer}", nn.Sigmoid())
            features = self.width
        net.add_module("linear4", nn.Linear(features, 10))
        for module in net.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=self.weight_std, generator=weights)
                nn.init.zeros_(module.bias)
        return net
