"""The activations that a norm layer can apply to its output (`act=`)."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,  # slope 0.01 below 0, torch's default
    "silu": F.silu,
    "gelu": F.gelu,  # the exact one, by erf
}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The function called `name`; ValueError names the known ones."""
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown act {name!r}: expected one of {', '.join(map(repr, ACTIVATIONS))} or None")
    return ACTIVATIONS[name]
