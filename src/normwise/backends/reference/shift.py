"""Internal covariate shift, two ways: how an update moves a layer's inputs, and how it changes its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

Layer = TypeVar("Layer")


def moved(before: Tensor, after: Tensor) -> float:
    """How far the distribution of each feature moved: Wasserstein-1 distance over the standard deviation before.

    Args:
        before, after: (features, values), in any order of the values.

    Returns:
        The mean over the features, those left out that are constant; 0 if all are.

    Source: the shift of inputs that Ioffe & Szegedy 2015, section 2, speak of; the measure is ours.
    """
    std = before.std(dim=1, correction=0)
    distance = (before.sort(dim=1).values - after.sort(dim=1).values).abs().mean(dim=1)
    lively = std > 1e-6
    return float((distance[lively] / std[lively]).mean()) if bool(lively.any()) else 0.0


def changed(before: Tensor, after: Tensor) -> tuple[float, float] | None:
    """(|G' - G| / |G|, cosine between G and G') of a layer's gradient G and what it is after the layers before it took
    their step, G'; None where G is 0.

    Divided by |G|, because norms change the size of gradients.

    Args:
        before, after: G and G', (values,).

    Source: Santurkar et al. 2018, definition 2.1.
    """
    size = float(before.norm())
    if size == 0:
        return None
    cosine = torch.nn.functional.cosine_similarity(before, after, dim=0)
    return float((after - before).norm()) / size, float(cosine)


def spread(layers: Sequence[Layer], most: int) -> list[Layer]:
    """Up to `most` of the layers in their order, evenly spread, without the first: no layer acts on its inputs."""
    later = list(layers)[1:]
    count = min(most, len(later))
    return [later[(place + 1) * len(later) // count - 1] for place in range(count)]
