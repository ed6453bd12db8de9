"""Batch normalization with the statistics of a batch that is spread over ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from normwise.backends.protocol import Moments
from normwise.ops import distributed, validity
from normwise.ops.dispatch import values_visible
from normwise.ops.distributed_norm import distributed_norm


def over_ranks(process_group: Any, x: Tensor, valid: Tensor | None) -> Callable[..., tuple[Tensor, Moments]] | None:
    """`reference.norm` with mean and variance of the valid elements of all ranks, each counted once; a rank may have
    none. None where this rank stands alone.

    All ranks update their running averages by the same bits, or, where the statistics are not finite, none does.

    Args:
        process_group: a torch.distributed group, or a layer's `StatsGroup`.

    Raises, on every rank:
        ValueError: the ranks disagree in the number of channels; in the call: one value per channel in all ranks'
            batches together, or none that is valid.
    """
    group = distributed.stats_group(process_group).group("batch_norm", x.device, {"number of channels": x.shape[1]})
    if group is None:
        return None

    def formula(*args: Any, **options: Any) -> tuple[Tensor, Moments]:
        y, moments = distributed_norm(*args, group=group, count_each=True, **options)
        _enough_values(x, valid, moments.count)
        return y, moments

    return formula


def _enough_values(x: Tensor, valid: Tensor | None, count: Tensor) -> None:
    """`count` is that of all ranks, so all of them raise alike."""
    # Two values of this rank's own are enough, without a look at what may still be on its way to a device.
    if count.numel() == 0 or not values_visible(count) or (valid is None and x.numel() > x.shape[1]):
        return
    least = int(count.min())
    if least == 0 and valid is not None and x.numel() > 0:
        raise ValueError(
            "mask (or lengths) leaves no valid element for a channel on any rank: there is nothing to take statistics "
            "of. Leave such a batch out on all ranks, or use eval mode"
        )
    validity.more_than_one(least, x, f"It is the only one on all ranks. {validity.BATCH_OF_ONE_CURE}")
