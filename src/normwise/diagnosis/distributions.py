"""Distributions, gathered batch by batch: exact moments of everything, percentiles of an evenly spaced part."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from normwise.backends import reference
from normwise.diagnosis.records import PERCENTILES, Activations, Distribution, Histogram, OverTime, Spread
from normwise.measure.axes import by_axis

BINS = 40
PART, SMALL_PART = 8192, 2048  # values a batch that percentiles are taken of; in a hurry
PARTS = 65536  # and in all; in a hurry also those that a mean and a deviation are taken of
LONGEST = 1024  # time steps that are followed


class Layout(NamedTuple):
    """Which axis of a tensor holds what; None where there is no such axis."""

    feature: int | None = None
    sample: int | None = None
    time: int | None = None


def spread(x: Tensor, most: int) -> Tensor:
    """At most so many values of a flat tensor, evenly spaced; the step has no factor in common with its size, so that
    it does not meet the same few features again and again."""
    step = max(1, math.ceil(x.numel() / most))
    while math.gcd(step, x.numel()) > 1:
        step += 1
    return x[::step]


def distribution(values: Tensor | Sequence[float]) -> Distribution:
    """Of all the values, in float64."""
    x = torch.as_tensor(values, dtype=torch.float64).detach().flatten().cpu()
    gathered = Gathered()
    gathered.add(x)
    return gathered.distribution()


class Gathered:
    """The distribution of values that come in batches.

    Args:
        part: how many values of a batch percentiles are taken of.
        moments_of: how many mean and deviation are taken of; None for all.
    """

    def __init__(self, part: int = PART, moments_of: int | None = None) -> None:
        self.part, self.moments_of = part, moments_of
        self.moments = Moments()
        self.nonfinite = 0
        self.minimum, self.maximum = math.inf, -math.inf
        self.parts: list[Tensor] = []
        self.kept = 0

    @torch.no_grad()
    def add(self, values: Tensor) -> float:
        """Returns the largest |x| of these values, 0 for none; NaN where one is not finite."""
        x = values.detach().reshape(-1)
        if not x.is_floating_point():
            x = x.to(torch.float32)
        if not x.numel():
            return 0.0
        # A NaN anywhere comes out of this as NaN.
        low, high = map(float, torch.aminmax(x))
        all_finite = math.isfinite(low) and math.isfinite(high)
        if not all_finite:
            finite = torch.isfinite(x)
            self.nonfinite += int((~finite).sum())
            x = x[finite]
            if not x.numel():
                return math.nan
            low, high = map(float, torch.aminmax(x))
        self.minimum, self.maximum = min(self.minimum, low), max(self.maximum, high)
        some = x if self.moments_of is None else spread(x, self.moments_of)
        var, mean = torch.var_mean(some if x.dtype == torch.float64 else some.float(), correction=0)
        self.moments.add(torch.tensor(x.numel()), mean.double().cpu(), var.double().cpu())
        if self.kept < PARTS:
            part = spread(x, self.part).double().cpu()
            self.parts.append(part)
            self.kept += len(part)
        return max(abs(low), abs(high)) if all_finite else math.nan

    def distribution(self) -> Distribution:
        if not self.parts:
            nan = math.nan
            empty = Histogram(nan, nan, [0] * BINS)
            return Distribution(0, self.nonfinite, nan, nan, nan, nan, [nan] * len(PERCENTILES), empty)
        values = torch.cat(self.parts).sort().values
        low, *percentiles, high = _percentiles(values, (0.5, *PERCENTILES, 99.5))
        return Distribution(
            int(self.moments.count),
            self.nonfinite,
            float(self.moments.mean),
            float(self.moments.std),
            self.minimum,
            self.maximum,
            percentiles,
            _histogram(values, low, high),
        )


def _percentiles(ordered: Tensor, wanted: Sequence[float]) -> list[float]:
    """Linear interpolation between the two nearest values, as torch.quantile has it, of values that are in order."""
    places = torch.tensor(wanted, dtype=torch.float64) / 100 * (len(ordered) - 1)
    below = places.long()
    found: list[float] = torch.lerp(
        ordered[below], ordered[(below + 1).clamp(max=len(ordered) - 1)], places - below
    ).tolist()
    return found


def _histogram(values: Tensor, low: float, high: float) -> Histogram:
    if not high > low:
        return Histogram(low, high, [len(values)] + [0] * (BINS - 1))
    counts = torch.histc(values.clamp(low, high), BINS, low, high)
    return Histogram(low, high, [int(count) for count in counts.tolist()])


class Moments:
    """Mean and biased variance of parts that come one after another (Chan, Golub & LeVeque 1979), in float64."""

    def __init__(self) -> None:
        self.count = torch.tensor(0.0, dtype=torch.float64)
        self.mean = torch.tensor(0.0, dtype=torch.float64)
        self.square = torch.tensor(0.0, dtype=torch.float64)  # sum of squared deviations

    def add(self, count: Tensor, mean: Tensor, var: Tensor) -> None:
        """`count` values of mean `mean` and biased variance `var`, elementwise."""
        count = count.double()
        total = self.count + count
        share = count / total.clamp(min=1)
        delta = mean - self.mean
        self.square = self.square + var * count + delta.square() * self.count * share
        self.mean = self.mean + delta * share
        self.count = total

    @property
    def var(self) -> Tensor:
        return self.square / self.count.clamp(min=1)

    @property
    def std(self) -> Tensor:
        return self.var.sqrt()


class Watched:
    """A layer's input or output over several calls."""

    def __init__(self, part: int = PART, moments_of: int | None = None) -> None:
        self.all = Gathered(part, moments_of)
        self.features: Moments | None = None
        self.sample_means: list[Tensor] = []
        self.sample_stds: list[Tensor] = []
        self.time: Moments | None = None
        self.time_parts: list[Tensor] = []
        self.shape: list[int] = []
        self.dtype = ""

    @torch.no_grad()
    def add(self, x: Tensor, layout: Layout, valid: Tensor | None = None) -> float:
        """One call's `x`; what is not `valid`, a bool tensor like it, does not count. Returns what `Gathered` does."""
        x = x.detach()
        self.note(x)
        size = self.all.add(x if valid is None else x[valid])
        if not x.numel() or not x.is_floating_point():
            return size
        if layout.feature is not None:
            rows = by_axis(x, layout.feature)
            self.features = self.features if self.features and self.features.mean.shape == (len(rows),) else Moments()
            add_rows(self.features, rows, _rows(valid, layout.feature))
        if layout.sample is not None and sum(map(len, self.sample_means)) < PARTS:
            count, mean, var = _of_rows(by_axis(x, layout.sample), _rows(valid, layout.sample))
            self.sample_means.append(mean[count > 0])
            self.sample_stds.append(var[count > 0].sqrt())
        if layout.time is not None and x.shape[layout.time] > 1:
            steps = _rows(valid, layout.time)
            self._add_time(by_axis(x, layout.time)[:LONGEST], None if steps is None else steps[:LONGEST])
        return size

    def note(self, x: Tensor) -> None:
        """Shape and dtype of the first call."""
        if not self.shape:
            self.shape, self.dtype = list(x.shape), str(x.dtype).removeprefix("torch.")

    def _add_time(self, rows: Tensor, valid: Tensor | None) -> None:
        if self.time is None or len(rows) > len(self.time.mean):
            longer = Moments()
            longer.count, longer.mean, longer.square = (torch.zeros(len(rows)).double() for _ in range(3))
            if self.time is not None:
                steps = len(self.time.mean)
                for name in ("count", "mean", "square"):
                    getattr(longer, name)[:steps] = getattr(self.time, name)
            self.time = longer
        padded = [torch.zeros(len(self.time.mean)).double() for _ in range(3)]
        for into, of in zip(padded, _of_rows(rows, valid), strict=True):
            into[: len(rows)] = of
        self.time.add(*padded)
        if len(self.time_parts) < 8:
            rows = rows if valid is None else rows.masked_fill(~valid, math.nan)
            self.time_parts.append(rows[:, :: max(1, rows.shape[1] // 256)].double().cpu())

    def activations(self) -> Activations:
        features = self.features
        return Activations(
            self.shape,
            self.dtype,
            self.all.distribution(),
            None if features is None else Spread(distribution(features.mean), distribution(features.std)),
            Spread(distribution(torch.cat(self.sample_means)), distribution(torch.cat(self.sample_stds)))
            if self.sample_means
            else None,
            None if self.time is None or not bool(self.time.count.any()) else self._over_time(self.time),
        )

    def _over_time(self, moments: Moments) -> OverTime:
        quantiles = torch.tensor([p / 100 for p in PERCENTILES], dtype=torch.float64)
        rows = []
        steps = int(moments.count.nonzero().max()) + 1  # padding may reach further than the longest sequence
        for t in range(steps):
            values = torch.cat([part[t] for part in self.time_parts if t < len(part)] or [moments.mean[t : t + 1]])
            rows.append(torch.nanquantile(values, quantiles))
        return OverTime(moments.mean[:steps].tolist(), moments.std[:steps].tolist(), torch.stack(rows).T.tolist())


def add_rows(moments: Moments, rows: Tensor, valid: Tensor | None = None) -> None:
    """One more batch of each row's values, of those that are `valid`."""
    moments.add(*_of_rows(rows, valid))


def _rows(valid: Tensor | None, axis: int) -> Tensor | None:
    """A mask as `by_axis` lays out what it masks."""
    return None if valid is None else valid.movedim(axis, 0).reshape(valid.shape[axis], -1)


def _of_rows(rows: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(count, mean, biased variance) of the values of each row."""
    if valid is None:
        var, mean = torch.var_mean(rows, dim=1, correction=0)
        return torch.full((len(rows),), rows.shape[1]), mean.double().cpu(), var.double().cpu()
    mean, var, count = (t[:, 0].double().cpu() for t in reference.moments(rows, [1], valid))
    return count, mean, var
