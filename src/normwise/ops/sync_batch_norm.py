"""Batch normalization with the statistics of a batch that is spread over ranks."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from normwise.ops import check, running
from normwise.ops.choose import values_visible
from normwise.ops.pooled_norm import pooled_norm
from normwise.ops.running import Moved


def sync_batch_norm(
    x: Tensor,
    averages: tuple[Tensor, Tensor] | None,
    gain: Tensor | None,
    shift: Tensor | None,
    momentum: float | Tensor,
    eps: float,
    valid: Tensor | None,
    group: dist.ProcessGroup,
) -> tuple[Tensor, Moved]:
    """gain * (x - mean) / sqrt(var + eps) + shift in training, and whether the running averages moved.

    Mean and variance are those of the valid elements of all ranks, each counted once; a rank may have none. All ranks
    move their averages by the same bits, or, where the statistics are not finite, none of them does.

    Args:
        gain, shift: (1, C, 1, ...), or None.
        valid: as from `check.validity`.

    Raises:
        ValueError, on every rank: one value a channel in all ranks' batches together, or none that is valid.
    """
    dims = (0, *range(2, x.dim()))
    y, moments = pooled_norm(x, dims, gain, shift, group, mask=valid, eps=eps, count_each=True)
    _enough_values(x, valid, moments.count)
    return y, True if averages is None else running.move(*averages, moments, momentum)


def _enough_values(x: Tensor, valid: Tensor | None, count: Tensor) -> None:
    """`count` is that of all ranks, so what is said here is said on each of them."""
    # Two values of this rank's own are enough, without a look at what may still be on its way to a device.
    if count.numel() == 0 or not values_visible(count) or (valid is None and x.numel() > x.shape[1]):
        return
    least = int(count.min())
    if least == 0 and valid is not None and x.numel() > 0:
        raise ValueError(
            "mask (or lengths) leaves no valid element for a channel on any rank: there is nothing to take statistics "
            "of. Leave such a batch out on all ranks, or use eval mode"
        )
    check.more_than_one(least, x, f"It is the only one on all ranks. {check.BATCH_OF_ONE_CURE}")
