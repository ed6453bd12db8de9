"""A tensor laid out by one of its axes."""

from __future__ import annotations

import torch
from torch import Tensor


def by_axis(x: Tensor, axis: int) -> Tensor:
    """(size of the axis, everything else), in at least float32."""
    x = x if x.dtype == torch.float64 else x.float()
    return x.movedim(axis, 0).reshape(x.shape[axis], -1)
