"""Pixel-by-pixel permuted MNIST, the experiment of Cooijmans et al. 2016, section 5.1, at its size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

import normwise
from normwise.lab.norms import recurrent_norm
from normwise.lab.tasks.base import Batch
from normwise.lab.tasks.on_idx import CHUNK, OnIdx
from normwise.lab.tasks.recurrent import LastState, over_steps

PIXELS = 28 * 28


@dataclass(frozen=True)
class RbnPmnist(OnIdx):
    """LSTM of 100 units, one pixel a step in one random order, RMSProp, batch 100, gradients clipped to norm 1.

    Recurrent weights are the identity for each gate, the others orthogonal, biases 0. What the paper does not give:
    the decay of RMSProp, here 0.99, and which permutation. With ``permuted`` False the pixels come row by row.

    With a norm h starts in training from normal numbers of deviation ``noise``. From zeros, while pixels are 0 as well,
    each norm would divide zeros by sqrt(eps) and multiply the gradient of that step by 316, until it is infinite. The
    paper injects noise of a size that it does not give; 0.1 is what the authors' published script for the pixels row
    by row sets. (In their code the noise is there in evaluation too.)
    """

    name: ClassVar[str] = "rbn-pmnist"
    summary: ClassVar[str] = (
        "LSTM of 100 units on images pixel by pixel in one random order, RMSProp (rate 0.001, momentum 0.9), "
        "batch 100, gradients clipped to norm 1, 100,000 steps (Cooijmans et al. 2016, section 5.1); with a norm, the "
        "initial state in training is noise of deviation 0.1"
    )
    norms: ClassVar[tuple[str, ...]] = ("none", "batch-per-step", "layer")
    batch_sizes: ClassVar[tuple[int, ...]] = (100,)
    learning_rates: ClassVar[tuple[float, ...]] = (0.001,)
    steps: ClassVar[int] = 100_000
    quick_steps: ClassVar[int] = 10
    clip: ClassVar[float] = 1.0
    looks: ClassVar[int] = 50
    looks_apart: ClassVar[int] = 10
    probe_cases: ClassVar[int] = 200
    curve_cases: ClassVar[int] = 1000

    hidden: int = 100
    permuted: bool = True
    permutation_seed: int = 0
    noise: float = 0.1

    def inputs(self, images: Tensor) -> Tensor:
        pixels = images.flatten(1)
        if self.permuted:
            pixels = pixels[:, torch.randperm(PIXELS, generator=torch.Generator().manual_seed(self.permutation_seed))]
        return (pixels / 255).unsqueeze(-1)

    def data(self) -> tuple[Batch, Batch]:
        """All sequences have 784 steps. They say so, since what is looked at step by step are sequences."""
        train, test = (Batch(b.inputs, b.targets, torch.full((len(b),), PIXELS)) for b in super().data())
        return train, test

    def optimizer(self, model: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
        """RMSProp with momentum 0.9."""
        return torch.optim.RMSprop(model.parameters(), lr=learning_rate, momentum=0.9)

    def model(self, norm: str, seed: int) -> nn.Module:
        layer = normwise.LSTM(1, self.hidden, batch_first=True, **recurrent_norm(norm, PIXELS))
        model = LastState(layer, 10, 0.0 if norm == "none" else self.noise)
        draws = torch.Generator().manual_seed(seed)
        for gate in layer.get_parameter("weight_ih_l0").detach().split(self.hidden):
            nn.init.orthogonal_(gate, generator=draws)
        for gate in layer.get_parameter("weight_hh_l0").detach().split(self.hidden):
            nn.init.eye_(gate)
        nn.init.orthogonal_(model.linear.weight, generator=draws)
        for name, parameter in model.named_parameters():
            if "bias" in name:
                nn.init.zeros_(parameter)
        return model

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Without gradients in chunks: the states of 784 steps of all test cases at once would fill the memory."""
        if torch.is_grad_enabled() or len(batch) <= CHUNK:
            scores: Tensor = model(batch.inputs)
            return scores
        return torch.cat([model(batch.inputs[at : at + CHUNK]) for at in range(0, len(batch), CHUNK)])

    def over_time(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        """As ``over_steps`` says."""
        assert isinstance(model, LastState)
        return over_steps(self, model, batch)
