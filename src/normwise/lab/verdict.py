"""From measured effects to a verdict. Pure functions of numbers; every claim's rule ends here.

An effect is one number a seed: a difference between two runs that start from the same weights and see the same
batches. The claim says that it is at least ``minimum``, the smallest effect that anybody would call one; for "no worse"
the minimum is negative. With the 95% interval (Student's t) of its mean over the seeds:

- supported: the whole interval is at or above the minimum;
- contradicted: the whole interval is below it;
- undecided: the minimum lies inside, or there are fewer than ``FEWEST_SEEDS`` seeds, whose spread says too little.

A claim of several parts is supported where all of them are, contradicted where one of them is, else undecided.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from statistics import fmean, stdev

from normwise.lab.score import T975

SUPPORTED, CONTRADICTED, UNDECIDED = "supported", "contradicted", "undecided"
FEWEST_SEEDS = 3
MOST_SEEDS = 200


@dataclass(frozen=True)
class Measured:
    """A quantity for each seed, and the keys of the runs behind it. Arithmetic pairs by seed: those that both have."""

    by_seed: Mapping[int, float]
    runs: tuple[str, ...] = ()

    def with_other(self, other: Measured, function: Callable[[float, float], float]) -> Measured:
        """``function`` of the two values of each seed."""
        both = {seed: function(a, other.by_seed[seed]) for seed, a in self.by_seed.items() if seed in other.by_seed}
        return Measured(both, tuple(dict.fromkeys((*self.runs, *other.runs))))

    def each(self, function: Callable[[float], float]) -> Measured:
        """``function`` of each value."""
        return Measured({seed: function(value) for seed, value in self.by_seed.items()}, self.runs)

    def __add__(self, other: Measured) -> Measured:
        return self.with_other(other, lambda a, b: a + b)

    def __sub__(self, other: Measured) -> Measured:
        return self.with_other(other, lambda a, b: a - b)

    def __neg__(self) -> Measured:
        return self.each(lambda a: -a)

    def __rmul__(self, factor: float) -> Measured:
        return self.each(lambda a: factor * a)


def log2_ratio(a: Measured, b: Measured) -> Measured:
    """log2(a / b): 1 where a is twice b. A seed at which one of them is not positive has none."""
    positive = (Measured({seed: v for seed, v in m.by_seed.items() if v > 0}, m.runs) for m in (a, b))
    return next(positive).with_other(next(positive), lambda x, y: math.log2(x / y))


def per_halving(by_size: Mapping[int, Measured]) -> Measured:
    """By how much a quantity grows each time the batch is halved: the least-squares slope over the batch sizes."""
    sizes = list(by_size)
    halvings = [-math.log2(size) for size in sizes]
    middle = fmean(halvings)
    weights = [(h - middle) / sum((g - middle) ** 2 for g in halvings) for h in halvings]
    weighted = [weight * by_size[size] for weight, size in zip(weights, sizes, strict=True)]
    return sum(weighted[1:], start=weighted[0])


@dataclass(frozen=True)
class Effect:
    """One part of a claim that runs decide: ``measured``, in ``unit``, is at least ``minimum``."""

    what: str
    unit: str
    minimum: float
    measured: Measured

    @cached_property
    def values(self) -> list[float]:
        """Finite ones alone, in the order of the seeds."""
        return [value for _, value in sorted(self.measured.by_seed.items()) if math.isfinite(value)]

    @property
    def runs(self) -> tuple[str, ...]:
        return self.measured.runs

    @property
    def mean(self) -> float | None:
        return fmean(self.values) if self.values else None

    @property
    def spread(self) -> float | None:
        """The sample standard deviation over the seeds; None with fewer than two."""
        return stdev(self.values) if len(self.values) > 1 else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95% interval of the mean; None with fewer than two seeds."""
        if len(self.values) < 2:
            return None
        mean, half = fmean(self.values), _half_width(stdev(self.values), len(self.values))
        return mean - half, mean + half

    @property
    def verdict(self) -> str:
        if len(self.values) < FEWEST_SEEDS or self.interval is None:
            return UNDECIDED
        low, high = self.interval
        return SUPPORTED if low >= self.minimum else CONTRADICTED if high < self.minimum else UNDECIDED

    @property
    def would_decide(self) -> str:
        """What would decide an undecided effect; "" for a decided one."""
        if self.verdict != UNDECIDED:
            return ""
        count = len(self.values)
        if count < FEWEST_SEEDS:
            return f"{count} of the {FEWEST_SEEDS} seeds that a verdict needs; more seeds (--seeds) would decide"
        away = abs(fmean(self.values) - self.minimum)
        spread = stdev(self.values)
        enough = next((n for n in range(count + 1, MOST_SEEDS + 1) if _half_width(spread, n) < away), None)
        if enough is None:
            return f"the effect is too near to its minimum: more than {MOST_SEEDS} seeds at this spread"
        return f"about {enough} seeds would decide, if effect and spread stay what they are"


def _half_width(spread: float, count: int) -> float:
    return T975[min(count - 1, len(T975)) - 1] * spread / math.sqrt(count)


@dataclass(frozen=True)
class Check:
    """One part of a claim that is computed: ``value`` is at most ``limit`` (or at least, if not ``at_most``)."""

    what: str
    value: float
    limit: float
    at_most: bool = True
    runs: tuple[str, ...] = field(default=(), init=False)
    would_decide: str = field(default="", init=False)

    @property
    def verdict(self) -> str:
        return SUPPORTED if (self.value <= self.limit if self.at_most else self.value >= self.limit) else CONTRADICTED


def combined(verdicts: Iterable[str]) -> str:
    """Of all parts together; no part at all leaves the claim open."""
    found = set(verdicts)
    if CONTRADICTED in found:
        return CONTRADICTED
    return SUPPORTED if found == {SUPPORTED} else UNDECIDED
