"""Where a tensor is, for code that must not wait for a device: what tests replace to say "as on a GPU"."""

from __future__ import annotations

from torch import Tensor


def on_cpu(t: Tensor) -> bool:
    """Whether a look at the values of `t` is cheap. Elsewhere it waits until the device has done all that was asked of
    it, a CUDA graph cannot be captured, and each of torch's operations is a launch of its own."""
    return t.is_cpu
