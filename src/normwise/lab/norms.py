"""The norms that the lab compares, by name, for each kind of input.

This is the one place where a name becomes a layer, so every task means the same by "layer" or "group".
Gains start at 1 and biases at 0 and no norm draws random numbers: with one seed all nets start from the same weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import normwise
from normwise.lab.errors import UndefinedError, unknown

NORMS: Mapping[str, str] = {
    "none": "no normalization",
    "batch": "BatchNorm: each feature or channel, over the batch and all positions",
    "layer": "LayerNorm: each sample, over all its features, channels and positions",
    "group": "GroupNorm: each sample, over a group of its features or channels and their positions",
    "instance": "InstanceNorm: each sample and channel, over its positions",
    "rms": "RMSNorm: as LayerNorm, by the root mean square and without subtracting the mean",
    "layer-plain": "LayerNorm without gain and bias",
    "dyt": "DyT: gain * tanh(alpha x) + bias, alpha a learned number from 0.5; it has no statistics (Zhu et al. 2025)",
    "dyt-1": "DyT with alpha from 1",
    "dyt-2": "DyT with alpha from 2",
    "derf": "Derf: gain * erf(alpha x + s) + bias, alpha from 0.5 and s from 0; no statistics (Chen et al. 2025)",
    "batch-masked": "BatchNorm over the valid positions alone, so that padding enters no statistics",
    "batch-per-step": "BatchNorm inside the recurrence, on both terms of the summed input (and the LSTM's cell): each "
    "time step has running statistics of its own, and later steps than any in training use the last one's "
    "(Cooijmans et al. 2016)",
    "batch-time-average": "the same in training; its running statistics are averaged over time, one set for all steps",
    "batch-input": "BatchNorm on the input-to-hidden term alone, over the batch and all its valid steps (Laurent et "
    "al. 2015, sequence-wise)",
}

DYT_ALPHAS = {"dyt": 0.5, "dyt-1": 1.0, "dyt-2": 2.0}

# What the layers say, after torch, when a statistic would come from a single value.
UNDEFINED_WORDS = ("Expected more than 1 value per channel", "Expected more than 1 spatial element")

# torch's classes and, since normwise's layers are subclasses of them, normwise's too.
NORM_LAYERS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def feature_norm(name: str, features: int) -> nn.Module:
    """A norm for (N, C); all but "batch", "group" and "instance" take (..., C).

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
            "layer-plain": lambda: normwise.LayerNorm(features, elementwise_affine=False),
            "group": lambda: normwise.GroupNorm(groups(features), features),
            "rms": lambda: normwise.RMSNorm(features),
            **{dyt: functools.partial(DyT, features, alpha) for dyt, alpha in DYT_ALPHAS.items()},
            "derf": functools.partial(Derf, features),
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
            "layer-plain": lambda: normwise.LayerNorm((channels, height, width), elementwise_affine=False),
            "group": lambda: normwise.GroupNorm(groups(channels), channels),
            "instance": lambda: normwise.InstanceNorm2d(channels, affine=True),
            "rms": lambda: normwise.RMSNorm((channels, height, width)),
        },
    )


def sequence_norm(name: str, features: int) -> nn.Module:
    """A norm for (N, T, C) whose forward takes ``x, valid``, the latter (N, T) bool, True where a sequence has a step.

    "batch" takes its statistics over all N * T positions, padding included, as a BatchNorm1d that knows of no lengths
    does; "batch-masked" over the valid ones. The others normalize each position by itself.

    Raises:
        LabError: an unknown name.
    """
    return _build(
        name,
        {
            "none": lambda: EachPosition(nn.Identity()),
            "batch": lambda: OverPositions(features, masked=False),
            "batch-masked": lambda: OverPositions(features, masked=True),
            "layer": lambda: EachPosition(normwise.LayerNorm(features)),
            "layer-plain": lambda: EachPosition(normwise.LayerNorm(features, elementwise_affine=False)),
            **{dyt: lambda: EachPosition(feature_norm(name, features)) for dyt in (*DYT_ALPHAS, "derf")},
            "rms": lambda: EachPosition(normwise.RMSNorm(features)),
        },
    )


class DyT(nn.Module):
    """gain * tanh(alpha x) + bias, with one learned alpha (Zhu et al. 2025, equation 1). Not a layer of the library:
    there are no statistics, so none of the four answers that a norm is made of."""

    def __init__(self, features: int, alpha: float = 0.5) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor(alpha))
        self.weight = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.bias, self.weight, torch.tanh(self.alpha * x))


class Derf(DyT):
    """gain * erf(alpha x + s) + bias (Chen et al. 2025). erf(x) is nearly tanh(1.2 x): a DyT of larger alpha."""

    def __init__(self, features: int, alpha: float = 0.5) -> None:
        super().__init__(features, alpha)
        self.shift = nn.Parameter(torch.tensor(0.0))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.bias, self.weight, torch.erf(self.alpha * x + self.shift))


class EachPosition(nn.Module):
    """A norm to which the other positions do not matter."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        y: Tensor = self.norm(x)
        return y


class OverPositions(nn.Module):
    """BatchNorm over the positions of all sequences, the valid ones alone if ``masked``."""

    def __init__(self, features: int, *, masked: bool) -> None:
        super().__init__()
        self.norm = normwise.BatchNorm1d(features)
        self.masked = masked

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        y: Tensor = self.norm(x.transpose(1, 2), mask=valid if self.masked else None)
        return y.transpose(1, 2)


def recurrent_norm(name: str, longest: int) -> dict[str, Any]:
    """The arguments by which ``normwise.RNN``, ``GRU`` and ``LSTM`` normalize inside the recurrence.

    "layer" and "rms" are Ba et al. 2016's recurrence. "batch-per-step" and "batch-time-average" are Cooijmans et al.
    2016's and compute the same in training: every step is normalized by the statistics of its own. They differ in
    what evaluation uses: running statistics for each step up to ``longest``, or one set averaged over all steps.
    "batch-input" is Laurent et al. 2015's, with one set over batch and time in training too.

    Args:
        name: one of the names above, or "none".
        longest: steps of the longest sequence in training.

    Raises:
        LabError: an unknown name.
    """
    cooijmans = {"norm": "batch", "variant": "cooijmans2016"}
    options: dict[str, dict[str, Any]] = {
        "none": {"norm": None},
        "layer": {"norm": "layer"},
        "rms": {"norm": "rms"},
        "batch-per-step": {**cooijmans, "num_stat_steps": longest},
        # All steps of a batch move the one row in turn. At this momentum they move it together as far as 0.1 moves a
        # row of its own, and each step counts about the same; at 0.1 the last few steps would be all that is left.
        "batch-time-average": {**cooijmans, "num_stat_steps": 1, "momentum": 1 - 0.9 ** (1 / longest)},
        "batch-input": {"norm": "batch", "variant": "laurent2015", "statistics": "sequence"},
    }
    if name not in options:
        raise unknown("norm", name, options)
    return options[name]


def groups(channels: int) -> int:
    """How many groups: as many as divide the channels into four or more each, and 8 at most."""
    return max(g for g in range(1, 9) if channels % g == 0 and (channels // g >= 4 or g == 1))


def _build(name: str, factories: Mapping[str, Callable[[], nn.Module]]) -> nn.Module:
    if name not in factories:
        raise unknown("norm", name, factories)
    return factories[name]()
