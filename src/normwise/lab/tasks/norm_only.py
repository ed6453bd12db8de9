"""Nets of which little is trained: the gains and biases of BatchNorm, or as many weights (Frankle et al. 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from normwise.lab.norms import NORM_LAYERS, image_norm
from normwise.lab.tasks.cnn import Cnn, Residual


@dataclass(frozen=True)
class NormsAlone(Cnn):
    """A stem, four residual blocks (14, 14, 7, 7 pixels a side), the mean over the pixels, one linear map.

    Of each channel two numbers are trained: gain and bias of its norm, or two weights of its kernel, drawn by the seed
    (then gains and biases stay 1 and 0). All else stays as it was drawn, the linear map too unless ``head``.
    """

    name: ClassVar[str] = "norms-alone"
    summary: ClassVar[str] = (
        "residual conv net (stem and four blocks, 16 to 32 channels, mean over the pixels) on digits (mnist_5k), of "
        "which gains and biases alone are trained; He's initial weights, SGD with momentum 0.9"
    )
    norms: ClassVar[tuple[str, ...]] = ("batch",)
    more_norms: ClassVar[tuple[str, ...]] = ()
    batch_sizes: ClassVar[tuple[int, ...]] = (32,)
    learning_rates: ClassVar[tuple[float, ...]] = (0.1, 0.3)
    steps: ClassVar[int] = 800
    looks_apart: ClassVar[int] = 1_000_000

    width: int = 16
    gains: bool = True
    head: bool = False

    def model(self, norm: str, seed: int) -> nn.Module:
        draws = torch.Generator().manual_seed(seed)
        wide = 2 * self.width
        net = nn.Sequential()
        net.add_module("conv", nn.Conv2d(1, self.width, 3, stride=2, padding=1, bias=False))
        net.add_module("norm", image_norm(norm, self.width, 14, 14))
        net.add_module("relu", nn.ReLU())
        net.add_module("block1", Residual(self.width, self.width, 14, norm))
        net.add_module("block2", Residual(self.width, self.width, 14, norm))
        net.add_module("block3", Residual(self.width, wide, 7, norm))
        net.add_module("block4", Residual(wide, wide, 7, norm))
        net.add_module("pool", nn.AdaptiveAvgPool2d(1))
        net.add_module("flatten", nn.Flatten())
        net.add_module("linear", nn.Linear(wide, 10))
        for module in net.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=draws)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        for name, module in net.named_modules():
            # A shortcut's convolution has no norm behind it, and so no gains that its weights would stand for.
            kernel = isinstance(module, nn.Conv2d) and not name.endswith("shortcut")
            trained = isinstance(module, NORM_LAYERS) if self.gains else kernel
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(trained or (self.head and name == "linear"))
            if isinstance(module, nn.Conv2d) and kernel and not self.gains:
                _train_two_a_channel(module.weight, draws)
        return net


def _train_two_a_channel(weight: Tensor, draws: torch.Generator) -> None:
    """Leave a gradient to two weights of each output channel, drawn at random."""
    flat = torch.rand(len(weight), weight[0].numel(), generator=draws)
    chosen = torch.zeros_like(flat).scatter_(1, flat.topk(2).indices, 1).view_as(weight)

    def keep(gradient: Tensor) -> Tensor:
        return gradient * chosen

    weight.register_hook(keep)


@dataclass(frozen=True)
class WeightsAlone(NormsAlone):
    """Two weights of each channel."""

    name: ClassVar[str] = "weights-alone"
    summary: ClassVar[str] = "the net of norms-alone, of which two weights of each channel's kernel alone are trained"

    gains: bool = False


@dataclass(frozen=True)
class NormsAndHead(NormsAlone):
    """Gains and biases, and the linear map."""

    name: ClassVar[str] = "norms-and-head"
    summary: ClassVar[str] = "the net of norms-alone, of which gains, biases and the last linear map are trained"

    head: bool = True


@dataclass(frozen=True)
class WeightsAndHead(WeightsAlone):
    """Two weights of each channel, and the linear map."""

    name: ClassVar[str] = "weights-and-head"
    summary: ClassVar[str] = "the net of weights-alone, whose last linear map is trained as well"

    head: bool = True
