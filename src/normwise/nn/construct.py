"""What the norm layers share: their gain and bias."""

from __future__ import annotations

from torch import Tensor, nn


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


def affine(layer: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """The layer's gain and bias, or what stands in for them (torch.nn.utils.parametrize makes properties of them).

    nn.Module's own look-up takes as long as a small norm, so parameters that are just that are read past it.
    """
    parameters = layer.__dict__["_parameters"]
    weight = parameters["weight"] if "weight" in parameters else getattr(layer, "weight", None)
    bias = parameters["bias"] if "bias" in parameters else getattr(layer, "bias", None)
    return weight, bias
