"""The count of batches for which a layer skipped the update of its running averages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from normwise.ops._torch_internals import is_fake


class CountsSkipped(nn.Module):
    """A layer that counts, outside its buffers, the batches whose update of the running averages it skipped.

    The count is no buffer, so that the layer's buffers are those of torch.nn: for code that pairs them with torch's,
    and where they come from elsewhere (a state_dict assigned to a layer on meta, `to_empty`, `functional_call`). It is
    a tensor, so that a GPU counts without a wait, and stays on the device of `running_mean`: it follows when the layer
    is used or moved.
    """

    running_mean: Tensor | None
    _skipped: Tensor | None = None

    @property
    def num_batches_skipped(self) -> Tensor | None:
        """How many batches were skipped, a 0-d tensor; None without running averages, or where they are on meta."""
        return self._skipped_count()

    def _skipped_count(self) -> Tensor | None:
        """The count, on the device of `running_mean`. A meta or fake tensor has none to keep."""
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

    def _add_skipped(self, batches: int | Tensor) -> None:
        count = self._skipped_count()
        if count is not None:
            count.add_(batches)

    def _reset_skipped(self) -> None:
        if self._skipped is not None:
            self._skipped.zero_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """`to`, `cuda`, `to_empty`: the count follows."""
        layer = super()._apply(fn, recurse)
        self._skipped_count()
        return layer
