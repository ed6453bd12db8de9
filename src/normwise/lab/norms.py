"""The norms that the lab compares, by name, for each kind of input.

This is the one place where a name becomes a layer, so every task means the same by "layer" or "group".
Gains start at 1 and biases at 0 and no norm draws random numbers: with one seed all nets start from the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

import normwise
from normwise.lab.errors import UndefinedError, unknown

NORMS: Mapping[str, str] = {
    "none": "no normalization",
    "batch": "BatchNorm: each feature or channel, over the batch and all positions",
    "layer": "LayerNorm: each sample, over all its features, channels and positions",
    "group": "GroupNorm: each sample, over a group of its features or channels and their positions",
    "instance": "InstanceNorm: each sample and channel, over its positions",
    "rms": "RMSNorm: as LayerNorm, by the root mean square and without subtracting the mean",
}

# What the layers say, after torch, when a statistic would come from a single value.
UNDEFINED_WORDS = ("Expected more than 1 value per channel", "Expected more than 1 spatial element")

# torch's classes and, since normwise's layers are subclasses of them, normwise's too.
NORM_LAYERS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def feature_norm(name: str, features: int) -> nn.Module:
    """A norm for (N, C).

    Raises:
        UndefinedError: InstanceNorm, which would normalize each value by itself.
        LabError: an unknown name.
    """
    if name == "instance":
        raise UndefinedError(
            "InstanceNorm normalizes each channel over its positions, and (N, C) has one position a channel: "
            "every output would be the bias. LayerNorm and GroupNorm are defined here."
        )
    return _build(
        name,
        {
            "none": nn.Identity,
            "batch": lambda: normwise.BatchNorm1d(features),
            "layer": lambda: normwise.LayerNorm(features),
            "group": lambda: normwise.GroupNorm(groups(features), features),
            "rms": lambda: normwise.RMSNorm(features),
        },
    )


def image_norm(name: str, channels: int, height: int, width: int) -> nn.Module:
    """A norm for (N, C, H, W).

    "layer" and "rms" take their statistics over (C, H, W), all the summed inputs of the layer, and give each of them
    its own gain (and bias), as Ba et al. 2016 define it; the others have a gain and bias a channel.

    Raises:
        LabError: an unknown name.
    """
    return _build(
        name,
        {
            "none": nn.Identity,
            "batch": lambda: normwise.BatchNorm2d(channels),
            "layer": lambda: normwise.LayerNorm((channels, height, width)),
            "group": lambda: normwise.GroupNorm(groups(channels), channels),
            "instance": lambda: normwise.InstanceNorm2d(channels, affine=True),
            "rms": lambda: normwise.RMSNorm((channels, height, width)),
        },
    )


def groups(channels: int) -> int:
    """How many groups: as many as divide the channels into four or more each, and 8 at most."""
    return max(g for g in range(1, 9) if channels % g == 0 and (channels // g >= 4 or g == 1))


def _build(name: str, factories: Mapping[str, Callable[[], nn.Module]]) -> nn.Module:
    if name not in factories:
        raise unknown("norm", name, factories)
    return factories[name]()
