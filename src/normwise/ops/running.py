"""Running averages of batch statistics: the third answer, "where the statistics come from", for evaluation."""

from __future__ import annotations

import torch
from torch import Tensor

from normwise.reference import Moments


def move(running_mean: Tensor, running_var: Tensor, moments: Moments, momentum: float | Tensor) -> None:
    """running <- running + momentum * (batch - running), in place, with the variance unbiased.

    Args:
        running_mean, running_var: (C,).
        moments: of one batch, with one element a channel once the kept axes are dropped.
        momentum: weight of the new batch.
    """
    with torch.no_grad():
        for running, new in ((running_mean, moments.mean), (running_var, unbiased_var(moments))):
            running.copy_(_towards(running, new.reshape(running.shape), momentum))


def move_over_samples(running_mean: Tensor, running_var: Tensor, moments: Moments, momentum: float | Tensor) -> None:
    """`move` by the average over samples (axis 0) of each sample's own moments.

    A sample without a valid element has no mean, and one with a single element no deviation: they are left out of
    the average. Where no sample is left, the running average stays.
    """
    with torch.no_grad():
        for running, new, needed in (
            (running_mean, moments.mean, 1),
            (running_var, unbiased_var(moments), 2),
        ):
            usable = (moments.count >= needed).to(new.dtype).expand_as(new)
            samples = usable.sum(0).reshape(running.shape)
            average = (new * usable).sum(0).reshape(running.shape) / samples.clamp(min=1)
            running.copy_(torch.where(samples > 0, _towards(running, average, momentum), running))


def _towards(running: Tensor, new: Tensor, momentum: float | Tensor) -> Tensor:
    """The next running average in the wider dtype, so that one of half precision is rounded once, when stored."""
    wide = torch.promote_types(running.dtype, new.dtype)
    weight = momentum.to(wide) if isinstance(momentum, Tensor) else momentum
    return torch.lerp(running.to(wide), new.to(wide), weight)


def unbiased_var(moments: Moments) -> Tensor:
    """The variance divided by count - 1 instead of count (torch's convention for running averages)."""
    return moments.var * (moments.count / (moments.count - 1).clamp(min=1))
