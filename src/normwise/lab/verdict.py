"""From measured effects to a verdict. Pure functions of numbers; every claim's rule ends here.

An effect is one number a seed: a difference between two runs that start from the same weights and see the same
batches. The claim says that it is at least ``minimum``, the smallest effect that anybody would call one; for "no worse"
the minimum is negative. With the 95% interval (Student's t) of its mean over the seeds:

- supported: the whole interval is at or above the minimum;
- contradicted: the whole interval is below it;
- undecided: the minimum lies inside, or there are fewer than ``FEWEST_SEEDS`` seeds, whose spread says too little.

**A verdict must have been possible.** Of the two verdicts one says that there is a difference (an effect of at least
so much; a loss of more than "no worse" allows), the other that there is none that counts. A difference that the
interval shows, in either direction, has proved that the task can show one: that verdict stands, at a ceiling as well,
since a ceiling makes differences smaller and never larger. Showing none proves nothing where none could have been
seen. So "contradicted" for a claimed difference, and "supported" for "no worse", hold only where

- there was room: the ``headroom``, what the best arm still lacks of the best that is possible, is on average at least
  ``PLANTED`` times the smallest effect. Where every norm is near 100% none can beat another, and none can be seen to
  be worse;
- a difference would have been found: an effect of ``PLANTED`` times the minimum, planted on the residuals of the
  measured seeds, is found by this same rule in at least ``POWER`` of the resampled experiments with as many seeds.
  Why twice: an effect of just the minimum is found in one experiment of 40 however many seeds there are, since the
  whole interval must lie beyond it. Twice leaves the rule as much distance as lies between the minimum and none.

Else the verdict is "cannot tell", with the reason. The direction that the interval shows need not be the claimed one:
where the other arm is better by the smallest effect or more, "contradicted" needs no headroom, and where the claimed
arm is better by as much, "no worse" needs none. Nor does either need the planted effect: with a large spread a small
effect would be missed, but the one that is there was not. An undecided effect whose mean lies where more seeds could
only show that there is no difference is "cannot tell" as well if there is no room: seeds do not make any.

What resampling can see is the spread over seeds. That of the held-out cases, which all runs share, it cannot.

**Several parts.** A claim says that all its parts hold. One that is contradicted contradicts the claim, whatever the
others may have been able to tell. It is supported where all are. Else it is undecided while a part is, since seeds may
still contradict that one; and if all that is not supported cannot tell, neither can the claim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from statistics import fmean, stdev

from normwise.lab.intervals import half_width, seeds_until, share_found

SUPPORTED, CONTRADICTED, UNDECIDED, CANNOT_TELL = "supported", "contradicted", "undecided", "cannot tell"
VERDICTS = (SUPPORTED, CONTRADICTED, UNDECIDED, CANNOT_TELL)
FEWEST_SEEDS = 3
MOST_SEEDS = 200
PLANTED = 2
UNBOUNDED = "a ratio on a logarithmic scale, which has no ceiling"
POWER = 0.8


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


def lacks(best: float, *arms: Measured, worst: float | None = None) -> Measured:
    """What the best of the arms (the one whose mean is nearest to ``best``) still lacks of ``best``, for each seed.

    Args:
        best: the best that is possible, in the unit of the arms: 100 points, a loss of 0.
        arms: what was measured, of which the higher or the lower may be better.
        worst: what an arm has that has learned nothing. The room is then no more than the best arm's distance from
            there: where nothing has been learned, no difference can show either.
    """
    known = [arm for arm in arms if arm.by_seed]
    if not known:
        return Measured({})
    top = min(known, key=lambda arm: abs(best - fmean(arm.by_seed.values())))
    return top.each(lambda value: abs(best - value) if worst is None else min(abs(best - value), abs(value - worst)))


@dataclass(frozen=True)
class Effect:
    """One part of a claim that runs decide: ``measured``, in ``unit``, is at least ``minimum``.

    ``headroom`` is how much of an effect the task had room for: what the best arm still lacks of the best that is
    possible (``lacks``), for each seed and in the same unit; or, as a sentence, why the quantity has no ceiling.
    """

    what: str
    unit: str
    minimum: float
    measured: Measured
    _: KW_ONLY
    headroom: Measured | str

    def __post_init__(self) -> None:
        if not self.minimum:
            raise ValueError(
                f"{self.what}: the smallest effect is {self.minimum}, expected a number that an effect must reach, or "
                "below zero what a loss must not; what holds exactly is a Check"
            )

    @cached_property
    def values(self) -> list[float]:
        """Finite ones alone, in the order of the seeds."""
        return _finite(self.measured)

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

    @cached_property
    def interval(self) -> tuple[float, float] | None:
        """The 95% interval of the mean; None with fewer than two seeds."""
        if len(self.values) < 2:
            return None
        mean, half = fmean(self.values), half_width(self.values)
        return mean - half, mean + half

    @cached_property
    def room(self) -> float | None:
        """The mean headroom; infinite where there is no ceiling, None where none was measured."""
        if isinstance(self.headroom, str):
            return math.inf
        found = _finite(self.headroom)
        return fmean(found) if found else None

    @cached_property
    def power(self) -> float | None:
        """The share of resampled experiments in which the planted effect is found; None with too few seeds."""
        return self._power(len(self.values)) if len(self.values) >= FEWEST_SEEDS else None

    @property
    def verdict(self) -> str:
        return self._judged[0]

    @property
    def reason(self) -> str:
        """Why the verdict is "cannot tell"; "" for the others."""
        return self._judged[1]

    @cached_property
    def _judged(self) -> tuple[str, str]:
        if len(self.values) < FEWEST_SEEDS or self.interval is None:
            return UNDECIDED, ""
        low, high = self.interval
        by_interval = SUPPORTED if low >= self.minimum else CONTRADICTED if high < self.minimum else UNDECIDED
        least = abs(self.minimum)
        if (by_interval != UNDECIDED and (low >= least or high <= -least)) or self._towards_a_difference:
            return by_interval, ""
        if self._no_room:
            return CANNOT_TELL, self._no_room
        if by_interval != UNDECIDED and self.power is not None and self.power < POWER:
            planted = f"{PLANTED * self.minimum:g} {self.unit}"
            return CANNOT_TELL, (
                f"too few seeds for the spread: an effect of {planted}, planted, is found in {self.power:.0%} of "
                f"resampled runs, and to tell takes {POWER:.0%}"
            )
        return by_interval, ""

    @property
    def _towards_a_difference(self) -> bool:
        """Whether more seeds, if the mean stays, would show the difference itself, not that there is none."""
        return fmean(self.values) >= self.minimum if self.minimum > 0 else fmean(self.values) < self.minimum

    @property
    def _no_room(self) -> str:
        """Why the task had no room for the effect; "" where it had."""
        if self.room is None:
            return "what the best arm still lacks of the best that is possible was not measured"
        needed = PLANTED * abs(self.minimum)
        if self.room >= needed:
            return ""
        return (
            f"no room: the best arm lacks {self.room:.3g} {self.unit} of the best that is possible, and to tell takes "
            f"{needed:g}"
        )

    def _power(self, count: int) -> float:
        """That of ``count`` seeds, if they spread as those that there are."""
        if self.minimum > 0:
            return share_found(self.values, PLANTED * self.minimum, count, lambda low, high: low >= self.minimum)
        return share_found(self.values, PLANTED * self.minimum, count, lambda low, high: high < self.minimum)

    @cached_property
    def seeds_needed(self) -> int | None:
        """About how many seeds a verdict takes, if effect and spread stay what they are; those that there are if it is
        decided. None: more than ``MOST_SEEDS``, or no number of them."""
        count = len(self.values)
        if self.verdict in (SUPPORTED, CONTRADICTED):
            return count
        if count < FEWEST_SEEDS:
            return FEWEST_SEEDS
        if self.verdict == CANNOT_TELL and self._no_room:
            return None
        needed = seeds_until(stdev(self.values), abs(fmean(self.values) - self.minimum), count, MOST_SEEDS)
        if needed is None or self._towards_a_difference or self._power(needed) >= POWER:
            return needed
        if self._power(MOST_SEEDS) < POWER:
            return None
        low, high = needed, MOST_SEEDS
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._power(middle) >= POWER else (middle, high)
        return high

    @property
    def would_decide(self) -> str:
        """What would decide an effect that is open; "" for a decided one."""
        count = len(self.values)
        if self.verdict in (SUPPORTED, CONTRADICTED):
            return ""
        if count < FEWEST_SEEDS:
            return f"{count} of the {FEWEST_SEEDS} seeds that a verdict needs; more seeds (--seeds) would decide"
        if self.seeds_needed is not None:
            return f"about {self.seeds_needed} seeds would decide, if effect and spread stay what they are"
        if self._no_room and self.verdict == CANNOT_TELL:
            return "no number of seeds would decide; a task with more room would"
        return f"the effect is too near to its minimum: more than {MOST_SEEDS} seeds at this spread"


def _finite(measured: Measured) -> list[float]:
    return [value for _, value in sorted(measured.by_seed.items()) if math.isfinite(value)]


@dataclass(frozen=True)
class Check:
    """One part of a claim that is computed: ``value`` is at most ``limit`` (or at least, if not ``at_most``)."""

    what: str
    value: float
    limit: float
    at_most: bool = True
    runs: tuple[str, ...] = field(default=(), init=False)
    would_decide: str = field(default="", init=False)
    reason: str = field(default="", init=False)

    @property
    def verdict(self) -> str:
        return SUPPORTED if (self.value <= self.limit if self.at_most else self.value >= self.limit) else CONTRADICTED


def combined(verdicts: Iterable[str]) -> str:
    """Of all parts together; no part at all leaves the claim open."""
    found = set(verdicts)
    if CONTRADICTED in found:
        return CONTRADICTED
    if UNDECIDED in found or not found:
        return UNDECIDED
    return CANNOT_TELL if CANNOT_TELL in found else SUPPORTED
