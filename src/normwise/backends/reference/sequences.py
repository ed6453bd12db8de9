"""Sequences of different lengths in one padded tensor (T, B, ...): which steps count, and running backwards."""

from __future__ import annotations

import torch
from torch import Tensor


def valid_steps(steps: int, lengths: Tensor) -> Tensor:
    """(T, B) bool: True where step t lies within sample b's `lengths[b]`."""
    return torch.arange(steps, device=lengths.device)[:, None] < lengths


def reverse(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Turn each sequence round within its own length; padding stays where it is. Its own inverse."""
    if lengths is None:
        return x.flip(0)
    steps = torch.arange(x.shape[0], device=x.device)[:, None]
    source = torch.where(steps < lengths, lengths - 1 - steps, steps)
    return x.gather(0, source.view(source.shape + (1,) * (x.dim() - 2)).expand_as(x))


def reverse_reset(reset: Tensor, lengths: Tensor | None) -> Tensor:
    """Where to zero the state when running backwards, in the order of processing.

    `reset[t]` marks the boundary between steps t-1 and t. Backwards, that boundary is crossed on the way from t to
    t-1, which is processed as step `length - t`; the boundary before step 0 is never crossed.
    """
    steps = torch.arange(reset.shape[0], device=reset.device)[:, None]
    ends = reset.shape[0] if lengths is None else lengths
    crossed = (steps > 0) & (steps < ends)
    source = torch.where(crossed, ends - steps, 0)
    return reset.gather(0, source.expand_as(reset)) & crossed
