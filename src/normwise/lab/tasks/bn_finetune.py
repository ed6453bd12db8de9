"""A net fine-tuned on fifty cases of less contrast: how far its running statistics come along."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from normwise.lab.tasks.base import Batch
from normwise.lab.tasks.relu_mlp import MEAN, STD, ReluMlp
from normwise.surgery import freeze, recalibrate


@dataclass(frozen=True)
class BnFinetune(ReluMlp):
    """Trained on the digits as they are; then, in several ways, on ``few`` of less contrast on a lighter ground.

    The ways, from the same weights on the same batches: BatchNorm's momentum 0.1 (torch's) or 0.01 (Keras's 0.99),
    running statistics frozen, and momentum 0.01 with statistics re-estimated afterwards on the same few cases.
    """

    name: ClassVar[str] = "bn-finetune"
    summary: ClassVar[str] = (
        "784-100-100-100-10 with ReLUs and BatchNorm on digits (mnist_5k), then fine-tuned on 50 of half the contrast, "
        "batch 8; He's initial weights, SGD with momentum 0.9"
    )
    norms: ClassVar[tuple[str, ...]] = ("batch",)
    learning_rates: ClassVar[tuple[float, ...]] = (0.01, 0.1)
    steps: ClassVar[int] = 300
    looks_apart: ClassVar[int] = 1_000_000

    few: int = 50
    epochs: int = 5
    fine_batch_size: int = 8
    fine_rate: float = 0.01
    contrast: float = 0.5
    ground: float = 0.25

    def shifted(self, inputs: Tensor) -> Tensor:
        """Grey levels g, from 0 to 1, become ground + contrast * g."""
        grey = MEAN + STD * inputs
        return (self.ground + self.contrast * grey - MEAN) / STD

    def at_end(self, model: nn.Module, batch_size: int, seed: int) -> Mapping[str, float]:
        train, held_out = self.cases
        draws = torch.Generator().manual_seed(seed)
        chosen = train.select(torch.randperm(len(train), generator=draws)[: self.few])
        few = Batch(self.shifted(chosen.inputs), chosen.targets)
        whole = self.few // self.fine_batch_size * self.fine_batch_size
        batches = [
            few.select(part)
            for _ in range(self.epochs)
            for part in torch.randperm(self.few, generator=draws)[:whole].split(self.fine_batch_size)
        ]
        there = [Batch(self.shifted(held_out.inputs), held_out.targets)]
        found = self.held_out(model, there, "untuned")
        for name, momentum, frozen in (("fast", 0.1, False), ("slow", 0.01, False), ("frozen", 0.1, True)):
            tuned = self._tuned(copy.deepcopy(model), batches, momentum, frozen)
            found |= self.held_out(tuned, there, name)
            if name == "slow":
                recalibrate(tuned, [few.inputs])
                found |= self.held_out(tuned, there, "recalibrated")
        return found

    def _tuned(self, model: nn.Module, batches: list[Batch], momentum: float, frozen: bool) -> nn.Module:
        model.train()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.momentum = momentum
        if frozen:
            freeze(model, affine=False)
        optimizer = self.optimizer(model, self.fine_rate)
        for batch in batches:
            optimizer.zero_grad()
            self.loss(self.forward(model, batch), batch).backward()
            optimizer.step()
        return model
