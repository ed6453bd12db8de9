"""The count of the batches that a layer left out of its running averages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from normwise.ops._torch_internals import is_fake


class CountsSkipped(nn.Module):
    """A layer with running averages that counts, beside its buffers, the batches that they left out.

    The count is no buffer, so that the layer's buffers are those of torch.nn: to hold its own among code that pairs
    them with torch's, and where they come from elsewhere (a state_dict assigned to a layer on meta, `to_empty`,
    `functional_call`). It is a tensor, so that a GPU counts without being waited for, and stays where `running_mean`
    is: it follows when the layer is used or moved.
    """

    running_mean: Tensor | None
    _skipped: Tensor | None = None

    @property
    def num_batches_skipped(self) -> Tensor | None:
        """How many batches were left out, a 0-d tensor; None without running averages, or where they are on meta."""
        return self._place_skipped()

    def _place_skipped(self) -> Tensor | None:
        """The count, beside `running_mean`. What only looks like a tensor (meta, fake) has none to keep."""
        mean, count = self.running_mean, self._skipped
        if mean is None or mean.is_meta:
            return None
        if is_fake(mean):
            return mean.new_zeros((), dtype=torch.int64)
        if count is None or type(count) is not type(mean):
            count = self._skipped = mean.new_zeros((), dtype=torch.int64)
        elif count.device != mean.device:
            count = self._skipped = count.to(mean.device)
        return count

    def _skip(self, batches: int | Tensor) -> None:
        count = self._place_skipped()
        if count is not None:
            count.add_(batches)

    def _forget_skipped(self) -> None:
        if self._skipped is not None:
            self._skipped.zero_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """`to`, `cuda`, `to_empty`: the count follows."""
        layer = super()._apply(fn, recurse)
        self._place_skipped()
        return layer
