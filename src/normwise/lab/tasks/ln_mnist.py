"""The permutation-invariant MNIST experiment of Ba et al. 2016, section 6.6 and figure 6, at its size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from normwise.lab.norms import feature_norm
from normwise.lab.tasks.on_idx import OnIdx

EPOCHS = 60


@dataclass(frozen=True)
class LnMnist(OnIdx):
    """784-1000-1000-10, norms before the nonlinearities and not on the logits, Adam, batch 128 and 4.

    The paper does not say which nonlinearity, rate or initial weights: here ReLU, 0.001 and He's. Its figure ends
    at 60 epochs.
    """

    name: ClassVar[str] = "ln-mnist"
    summary: ClassVar[str] = (
        "784-1000-1000-10 on images as vectors, Adam, batch 128 and 4, 60 epochs, no norm on the logits (Ba et al. "
        "2016, section 6.6). What the paper does not give: ReLU, rate 0.001, He's initial weights"
    )
    norms: ClassVar[tuple[str, ...]] = ("none", "batch", "layer")
    batch_sizes: ClassVar[tuple[int, ...]] = (128, 4)
    learning_rates: ClassVar[tuple[float, ...]] = (0.001,)
    quick_steps: ClassVar[int] = 400

    width: int = 1000

    def inputs(self, images: Tensor) -> Tensor:
        return images.flatten(1) / 255

    def paper_steps(self, batch_size: int) -> int:
        return EPOCHS * (len(self.cases[0]) // batch_size)

    def optimizer(self, model: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(model.parameters(), lr=learning_rate, fused=True)

    def model(self, norm: str, seed: int) -> nn.Module:
        weights = torch.Generator().manual_seed(seed)
        net = nn.Sequential()
        features = 784
        for layer in (1, 2):
            net.add_module(f"linear{layer}", nn.Linear(features, self.width))
            net.add_module(f"norm{layer}", feature_norm(norm, self.width))
            net.add_module(f"relu{layer}", nn.ReLU())
            features = self.width
        net.add_module("linear3", nn.Linear(features, 10))
        for module in net.modules():
            if isinstance(module, nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=weights)
                nn.init.zeros_(module.bias)
        return net
