"""What the constructors of the norm layers share."""

from __future__ import annotations

from torch import nn


def affine_without_bias(layer: nn.Module, drop: bool) -> None:
    """Take the bias out of a layer that its torch.nn parent built with one (torch before 2.13 knows no `bias=`)."""
    if drop:
        layer.register_parameter("bias", None)


def reset_affine(layer: nn.Module) -> None:
    """Gain 1 and bias 0, where the layer has them: the layer then only standardizes."""
    for name, value in (("weight", 1.0), ("bias", 0.0)):
        parameter = getattr(layer, name, None)
        if parameter is not None:
            nn.init.constant_(parameter, value)
