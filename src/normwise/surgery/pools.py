"""The moments that layers with running statistics see in a pass over data, and how they are stored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from normwise.backends.reference import Moments, combined, moments
from normwise.nn import recurrent_base, recurrent_cells
from normwise.nn.construct import channel_axis
from normwise.ops import inputs, ragged, validity
from normwise.ops.norm.domains import one_domain_each, one_for_all
from normwise.ops.norm.running_stats import corrected_var
from normwise.surgery.select import INSTANCE
from normwise.words import counted


class Pool(ABC):
    """What one layer has received.

    Attributes:
        layer: whose running statistics are set. called: what the model calls, the same unless its class is another's.
        parts: moments in float64 by name, empty ones to begin with; what ranks pool is this.
        batches, skipped: how many came and, of them, were not finite.
    """

    def __init__(self, layer: Any, shapes: dict[str, tuple[torch.Size, torch.Size]]) -> None:
        self.layer = self.called = layer
        self.parts = {
            name: Moments(*(torch.zeros(size, dtype=torch.float64) for size in (shape, shape, counts)))
            for name, (shape, counts) in shapes.items()
        }
        self.batches = self.skipped = 0

    @abstractmethod
    def observe(self) -> Callable[[], None]:
        """Start collecting; the returned function ends it."""

    @abstractmethod
    def enough(self) -> bool:
        """Whether there are enough values to store."""

    @abstractmethod
    def store(self) -> None:
        """Set the layer's running statistics."""

    @abstractmethod
    def values(self) -> str:
        """How many values came, in words."""

    def why_not(self) -> str | None:
        """Why there is nothing to store."""
        if self.enough():
            return None
        if self.skipped:
            batches = counted(self.skipped, "batch")
            return f"no finite value in {batches}: look for NaN in the data or in the weights before it"
        return "the model's forward did not call it, or with fewer than two values per channel"

    def add_moments(self, name: str, new: Moments) -> None:
        """Pool `new` with the moments so far."""
        old = self.parts[name]
        new = Moments(*(t.double() for t in new))
        both = [torch.stack([t.to(n.device), n]) for t, n in zip(old, new, strict=True)]
        self.parts[name] = combined(Moments(*both))

    def __str__(self) -> str:
        return self.values() + (f"; batches skipped as not finite: {self.skipped}" if self.skipped else "")


class _OfInputs(Pool):
    """The moments of what a layer is called with."""

    @abstractmethod
    def add(self, x: Any, mask: Tensor | None, lengths: Tensor | None, domain: Any) -> None:
        """One call's input."""

    def observe(self) -> Callable[[], None]:
        @torch.no_grad()
        def look(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = (kwargs.get(name) for name in ("mask", "lengths", "domain"))
            self.add(args[0] if args else kwargs["input"], *given)

        return self.called.register_forward_pre_hook(look, with_kwargs=True).remove  # type: ignore[no-any-return]


class _OfBatchNorm(_OfInputs):
    """The values of each channel, (C,)."""

    def __init__(self, layer: nn.Module) -> None:
        size = layer.get_buffer("running_mean").shape
        super().__init__(layer, {"": (size, size)})

    def add(self, x: Any, mask: Tensor | None, lengths: Tensor | None, domain: Any) -> None:
        if ragged.is_ragged(x):

            def by_rows(rows: Tensor, residual: None) -> Tensor:
                self.add(rows, None, None, domain)
                return rows

            ragged.by_rows(by_rows, x, mask=mask, lengths=lengths, residual=None)
            return
        x, mask, _ = inputs.channels_to_axis_1("recalibrate", x, channel_axis(self.layer), mask, None)
        valid = validity.valid_elements(x, mask, lengths, channel_dim=1)
        domain = one_for_all(domain)
        domains = getattr(self.layer, "domains", None)
        if (domain is None) is not (domains is None):
            return  # the layer is about to say what is wrong
        if domains is not None and isinstance(domain, int) and not 0 <= domain < domains:
            return
        if domains is not None and not isinstance(domain, int):
            of_each = one_domain_each(domain, x.shape[0], domains, x.device)
            for one in of_each.unique().tolist():
                mine = (of_each == one).nonzero().flatten()
                part = None if valid is None else valid.expand(x.shape[0], *valid.shape[1:])[mine]
                self._add(x[mine], part, one)
        else:
            self._add(x, valid, domain)

    def _add(self, x: Tensor, valid: Tensor | None, domain: int | None) -> None:
        """What is valid of an input, of one domain where there are several."""
        found = moments(x, (0, *range(2, x.dim())), valid)
        if not (found.mean.isfinite().all() and found.var.isfinite().all()):
            self.skipped += 1
            return
        self.batches += 1
        each = Moments(*(t.reshape(-1).expand(x.shape[1]) for t in found))
        if domain is not None:
            size = self.layer.running_mean.shape
            each = Moments(*(t.new_zeros(size).index_copy(0, t.new_tensor([domain]).long(), t[None]) for t in each))
        self.add_moments("", each)

    def enough(self) -> bool:
        return bool(self._met().any())

    def _met(self) -> Tensor:
        """Of which domains, or of the one, there are enough values."""
        return self.parts[""].count.amin(-1, keepdim=True) > 1

    def store(self) -> None:
        found = self.parts[""]
        met = self._met()
        var = corrected_var(found, getattr(self.layer, "correction", 1))
        for running, new in ((self.layer.running_mean, found.mean), (self.layer.running_var, var)):
            running.copy_(torch.where(met, new.to(running.dtype), running))
        if (tracked := self.layer.num_batches_tracked) is not None:
            tracked.copy_(torch.where(met.view(tracked.shape), self.batches, tracked))

    def values(self) -> str:
        low, high = (int(count) for count in torch.aminmax(self.parts[""].count))
        return f"{counted(low, 'value')} per channel" if low == high else f"{low:,} to {high:,} values per channel"


class _OfInstanceNorm(_OfInputs):
    """The moments (C,) of each sample, averaged over the samples that have some: as in training, but all alike."""

    def __init__(self, layer: nn.Module) -> None:
        size = layer.get_buffer("running_mean").shape
        super().__init__(layer, {"mean": (size, size), "var": (size, size)})

    def add(self, x: Any, mask: Tensor | None, lengths: Tensor | None, domain: Any) -> None:
        if x.dim() == self.layer._get_no_batch_dim():
            x = x.unsqueeze(0)
            mask = None if mask is None else mask.unsqueeze(0)
            lengths = None if lengths is None else lengths.reshape(1)
        x, mask, _ = inputs.channels_to_axis_1("recalibrate", x, channel_axis(self.layer), mask, None)
        found = moments(x, range(2, x.dim()), validity.valid_elements(x, mask, lengths, channel_dim=1))
        mean, var, count = (t.reshape(*t.shape[:2]).expand(x.shape[:2]) for t in found)
        var = corrected_var(Moments(mean, var, count))
        finite = mean.isfinite() & var.isfinite()
        if not finite.all():
            self.skipped += 1
        self.batches += 1
        for name, each, needed in (("mean", mean, 1), ("var", var, 2)):
            usable = (count >= needed) & finite
            one = Moments(torch.where(usable, each, 0), torch.zeros_like(each), usable)
            self.add_moments(name, combined(Moments(*(t.double() for t in one))))

    def enough(self) -> bool:
        return int(self.parts["var"].count.min()) > 0

    def store(self) -> None:
        self.layer.running_mean.copy_(self.parts["mean"].mean)
        self.layer.running_var.copy_(self.parts["var"].mean)

    def values(self) -> str:
        return f"averages over {counted(int(self.parts['mean'].count.max()), 'sample')}"


class _OfRecurrent(Pool):
    """The values at each step, a row (features,) for each row of the tables."""

    def __init__(self, layer: nn.Module) -> None:
        prefix = "running_mean_"
        tables = {name[len(prefix) :]: t for name, t in layer.named_buffers(recurse=False) if name.startswith(prefix)}
        super().__init__(layer, {name: (t.shape, t[:, :1].shape) for name, t in tables.items()})

    def observe(self) -> Callable[[], None]:
        def end() -> None:
            self.layer.stats_observer = None

        self.layer.stats_observer = self.add
        return end

    @torch.no_grad()
    def add(self, name: str, new: Moments, first: int) -> None:
        """The moments of steps `first` and later; those without a row of their own share the last one."""
        finite = (new.mean.isfinite() & new.var.isfinite()).all(-1, keepdim=True)
        mean, var, count = (torch.where(finite, t, 0).double() for t in new)
        if name == next(iter(self.parts)):  # once a call, not once a table
            self.skipped += int(not finite.all())
            self.batches += 1
        rows = len(self.parts[name].mean)
        own = max(0, min(rows - 1 - first, len(mean)))
        table = [t.new_zeros(rows, t.shape[1]) for t in (mean, var, count)]
        for row, t in zip(table, (mean, var, count), strict=True):
            row[first : first + own] = t[:own]
        if own < len(mean):
            shared = combined(Moments(mean[own:], var[own:], count[own:]))
            for row, value in zip(table, shared, strict=True):
                row[-1] = value
        self.add_moments(name, Moments(*table))

    def enough(self) -> bool:
        return all(bool((part.count > 1).any()) for part in self.parts.values())

    def store(self) -> None:
        for name, found in self.parts.items():
            met = found.count > 1
            for kind, new in (("mean", found.mean), ("var", corrected_var(found))):
                table = self.layer.get_buffer(f"running_{kind}_{name}")
                table.copy_(torch.where(met, new.to(table.dtype), table))

    def values(self) -> str:
        count = next(iter(self.parts.values())).count[:, 0]
        met = int((count > 1).sum())
        some = f"{met} of {counted(len(count), 'step')}" if len(count) > 1 else "all steps together"
        return f"{some}, {counted(int(count.max()), 'value')} at most"


def pool_of(layer: nn.Module, called: nn.Module) -> Pool:
    """An empty pool for a layer that keeps running statistics, and hears of its input where `called` is called."""
    if isinstance(layer, (recurrent_base.Recurrent, recurrent_cells._Cell)):
        return _OfRecurrent(layer)
    pool = _OfInstanceNorm(layer) if isinstance(layer, INSTANCE) else _OfBatchNorm(layer)
    pool.called = called
    return pool
