"""The count of batches for which a layer skipped the update of its running averages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from normwise.backends.devices import on_cpu
from normwise.ops._torch_internals import is_fake
from normwise.ops.norm import running_stats

# Flags that a layer keeps: half a kilobyte each by the allocator of CUDA, and five launches for all of them.
FLAGS_AT_ONCE = 128


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
        self._count_flags()
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

    def _add_skipped_unless(self, updated: Tensor) -> None:
        """Count a batch unless `updated`, a 0-d bool tensor; on a GPU many at once, so that a call launches nothing."""
        if on_cpu(updated) or not running_stats.can_keep(updated):
            self._add_skipped(~updated)
            return
        flags = self._flags
        flags.append(updated)
        if len(flags) >= FLAGS_AT_ONCE:
            self._count_flags()

    @property
    def _flags(self) -> list[Tensor]:
        """Of the last updates on a GPU: True where one took place. A list, which the replicas of DataParallel share."""
        return self.__dict__.setdefault("_flags_to_count", [])  # type: ignore[no-any-return]

    def _count_flags(self) -> None:
        flags = self._flags
        if not flags or torch.compiler.is_compiling():
            return
        taken = flags[:]
        del flags[: len(taken)]
        count = self._skipped_count()
        if count is None:
            return
        for flag in taken:
            if flag.is_cuda:  # made on another stream, maybe, for whose next tensors its memory would be used
                flag.record_stream(torch.cuda.current_stream(flag.device))
        count.add_((~torch.stack([flag.to(count.device) for flag in taken])).sum())

    def _reset_skipped(self) -> None:
        self._flags.clear()
        if self._skipped is not None:
            self._skipped.zero_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """`to`, `cuda`, `to_empty`: the count follows."""
        self._count_flags()
        layer = super()._apply(fn, recurse)
        self._skipped_count()
        return layer
