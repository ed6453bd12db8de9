"""(N, C, ...) as norms of channels see it.

`backends/cpu/norms.py` asks the same of a tensor in its own lines: there a call of a Python function is a tenth of what
a small norm takes.
"""

from __future__ import annotations

from torch import Tensor


def channel_dims(x: Tensor) -> tuple[int, ...]:
    """The axes that share the statistics of a channel: all but the second."""
    return (0, *range(2, x.dim()))


def channel_shape(x: Tensor) -> tuple[int, ...]:
    """The shape of a vector of channels that broadcasts to `x`."""
    return (1, -1, *(1,) * (x.dim() - 2))


def channels_last(x: Tensor) -> bool:
    """Whether the channels of each position lie side by side, and those of a channel do not."""
    return not x.is_contiguous() and x.movedim(1, -1).is_contiguous()
