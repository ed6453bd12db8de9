"""Running statistics of a recurrent batch norm: a table with a row for each step, the last for all later steps."""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from normwise.backends.protocol import Moments, Running
from normwise.ops._torch_internals import is_batchedtensor
from normwise.ops.norm.running_stats import corrected_var, is_recomputing

# Called with the moments of each call while `recalibrate` runs: the suffix of the tables' names, the moments, the first
# step. The layer then takes batch statistics in evaluation too, and updates nothing.
StatsObserver: TypeAlias = Callable[[str, Moments, int], None]


class BatchStats(NamedTuple):
    """The running statistics of a batch norm inside a recurrence, and how a call updates them.

    Attributes:
        tables: running mean and variance by site, for each layer and direction.
        suffixes: of their names.
        momentum: weight of the new batch.
        uses_batch: normalize by the batch's moments; otherwise by the tables.
        observer: receives the moments, which then update nothing.
    """

    tables: tuple[Running, ...]
    suffixes: tuple[str, ...]
    momentum: float
    uses_batch: bool
    observer: StatsObserver | None = None

    @property
    def steps(self) -> int:
        """How many steps have a row to themselves, the last shared by all later ones."""
        return next(len(mean) for table in self.tables for mean, _ in table.values())

    def update(self, statistics: list[dict[str, Moments]], start_step: int) -> None:
        """Update the tables by the moments of a call, by site for each layer and direction."""
        for table, suffix, used in zip(self.tables, self.suffixes, statistics, strict=True):
            for site, moments in used.items():
                if self.observer is None:
                    update_tables(*table[site], moments, self.momentum, start_step)
                else:
                    self.observer(site + suffix, moments, start_step)


def update_tables(
    running_mean: Tensor, running_var: Tensor, moments: Moments, momentum: float, start_step: int = 0
) -> None:
    """Row min(start_step + t, rows - 1) <- (1 - momentum) * row + momentum * step t, in place, the variance unbiased.

    Steps that share the last row update it one after the other. A step at which fewer than two samples were running has
    no deviation and updates nothing, nor does a step whose moments are NaN or infinite, nor a forward that activation
    checkpointing repeats.

    Args:
        running_mean, running_var: (rows, features).
        moments: of T steps in order: mean and var (T, features), count (T, 1).
        momentum: weight of the new batch.
        start_step: the row of the first step.

    Raises:
        RuntimeError: several samples of a torch.func.vmap would update the same table.
    """
    if is_recomputing():
        return
    if is_batchedtensor(moments.mean) and not is_batchedtensor(running_mean):
        raise RuntimeError(
            "Batch norm got a batched tensor as input while the running_mean or running_var, which will be updated in "
            "place, were not batched: use eval mode, norm='layer' or 'rms', or give each sample tables of its own "
            "(torch.func.stack_module_state and functional_call)"
        )
    with torch.no_grad():
        rows, steps = len(running_mean), len(moments.mean)
        own = max(0, min(rows - 1 - start_step, steps))  # steps with a row to themselves
        var = corrected_var(moments)
        finite = (moments.mean.isfinite() & var.isfinite()).all(-1, keepdim=True)
        counts = ((moments.count >= 2) & finite).to(running_mean.dtype)
        for running, new in ((running_mean, moments.mean), (running_var, var)):
            new = torch.where(finite, new, 0).to(running.dtype)
            if own:
                mine = running[start_step : start_step + own]
                mine.add_(momentum * counts[:own] * (new[:own] - mine))
            if own < steps:
                # n updates in a row: (1-m)^n * old + sum over k of m * (1-m)^(updates after k) * step k.
                updates = counts[own:]
                after = updates.flip(0).cumsum(0).flip(0) - updates
                share = momentum * updates * (1 - momentum) ** after
                running[-1].mul_((1 - momentum) ** updates.sum()).add_((share * new[own:]).sum(0))
