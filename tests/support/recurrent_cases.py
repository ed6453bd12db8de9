"""The recurrent layers and cells that tests run over."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

import normwise

LAYERS = {"lstm": normwise.LSTM, "gru": normwise.GRU, "rnn": normwise.RNN}
CELLS = {"lstm": normwise.LSTMCell, "gru": normwise.GRUCell, "rnn": normwise.RNNCell}
Layer = TypeVar("Layer", bound=nn.Module)


def away_from_start(layer: Layer) -> Layer:
    """The layer with norms and biases moved: where they start, a forgotten or exchanged one would not show."""
    with torch.no_grad():
        for name, value in layer.named_parameters():
            if not name.startswith("weight"):
                value.add_(torch.randn_like(value) * 0.3)
        for name, value in layer.named_buffers():
            value.copy_(torch.rand_like(value) + 0.5 if "var" in name else torch.randn_like(value))
    return layer
