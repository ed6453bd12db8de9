"""Text with an LSTM or a GRU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

import normwise
from normwise.lab.norms import recurrent_norm
from normwise.lab.tasks.charlm import ON_TEXT, CharLm


class NextCharacter(nn.Module):
    """Characters, a recurrent layer, scores from its state at each step."""

    def __init__(self, characters: int, layer: normwise.LSTM | normwise.GRU) -> None:
        super().__init__()
        self.embed = nn.Embedding(characters, layer.input_size)
        self.recurrent = layer
        self.linear = nn.Linear(layer.hidden_size, characters)

    def forward(self, numbers: Tensor) -> Tensor:
        states, _ = self.recurrent(self.embed(numbers))
        scores: Tensor = self.linear(states)
        return scores


@dataclass(frozen=True)
class CharLmRecurrent(CharLm):
    """One layer of ``cell``. Orthogonal hidden-to-hidden weights, gate by gate; the others keep a unit variance."""

    cell: ClassVar[type[normwise.LSTM] | type[normwise.GRU]]
    norms: ClassVar[tuple[str, ...]] = ("none", "layer", "rms", "batch-input")
    more_norms: ClassVar[tuple[str, ...]] = (
        "batch-per-step",
        "batch-time-average",
    )  # each as slow as the others together

    def model(self, norm: str, seed: int) -> nn.Module:
        layer = self.cell(self.width, self.width, batch_first=True, **recurrent_norm(norm, self.length))
        model = NextCharacter(len(self.characters), layer)
        draws = torch.Generator().manual_seed(seed)
        nn.init.normal_(model.embed.weight, generator=draws)
        nn.init.normal_(layer.get_parameter("weight_ih_l0"), std=self.width**-0.5, generator=draws)
        for gate in layer.get_parameter("weight_hh_l0").detach().split(self.width):
            nn.init.orthogonal_(gate, generator=draws)
        nn.init.normal_(model.linear.weight, std=self.width**-0.5, generator=draws)
        for name, parameter in model.named_parameters():
            if "bias" in name:
                nn.init.zeros_(parameter)
        if layer.cell == "lstm":  # the forget gates start open
            with torch.no_grad():
                layer.get_parameter("bias_ih_l0")[self.width : 2 * self.width] = 1
        return model


@dataclass(frozen=True)
class CharLmLstm(CharLmRecurrent):
    """normwise.LSTM; the forget gates start open, at a bias of 1."""

    name: ClassVar[str] = "charlm-lstm"
    summary: ClassVar[str] = f"LSTM {ON_TEXT}; orthogonal recurrent weights, forget bias 1, Adam"
    cell: ClassVar[type[normwise.LSTM]] = normwise.LSTM


@dataclass(frozen=True)
class CharLmGru(CharLmRecurrent):
    """normwise.GRU."""

    name: ClassVar[str] = "charlm-gru"
    summary: ClassVar[str] = f"GRU {ON_TEXT}; orthogonal recurrent weights, Adam"
    cell: ClassVar[type[normwise.GRU]] = normwise.GRU
