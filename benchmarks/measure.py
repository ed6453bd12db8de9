"""Timing on a noisy machine: ratios of neighbours in time, and no sample while a core is stolen."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

Call = Callable[[], object]

PAIRS = 15
WARM_SECONDS = 0.3  # three calls, or so long, before anything counts
LIMIT_EVERY = 3  # rounds: the limit has no part in the ratio
SAMPLE_SECONDS = 0.004  # long enough for the clock, short enough that little happens in between
STOLEN = 5.0  # a probe this many times slower than the best one seen means that another process has a core
WAIT_SECONDS = 30.0  # so much lost to others, and a busy machine is taken as it is, and the result says so


class Ratio(NamedTuple):
    """The median of pairwise ratios ours/theirs with its 20th and 80th percentile, and seconds a call."""

    median: float
    p20: float
    p80: float
    ours: float
    theirs: float
    limit: float | None
    stolen: int  # samples that a stolen core spoiled, measured again
    quiet: bool  # False: the machine never was, the figures are those of a busy one


class Probe:
    """A small parallel region whose time tells whether all threads have a core."""

    def __init__(self) -> None:
        self.x = torch.ones(1 << 18)
        self.best = min(self._time() for _ in range(20))

    def _time(self) -> float:
        start = time.perf_counter()
        self.x.mul_(1.0)
        return time.perf_counter() - start

    def quiet(self) -> bool:
        now = min(self._time(), self._time())
        self.best = min(self.best, now)
        return now < STOLEN * self.best


class Rounds(NamedTuple):
    """Seconds a call of each way, by round; those of `seldom`; `stolen` and `quiet` as in `Ratio`."""

    seconds: list[list[float]]
    seldom: list[float]
    stolen: int
    quiet: bool


def compare(ours: Call, theirs: Call, limit: Call | None, probe: Probe) -> Ratio:
    """Ours, theirs, ours, theirs, ... with a probe before and after each round, and the limit in between."""
    found = rounds([ours, theirs], probe, PAIRS, limit)
    our_seconds, their_seconds = zip(*found.seconds, strict=True)
    return Ratio(
        *ratio(our_seconds, their_seconds),
        _median(our_seconds),
        _median(their_seconds),
        _median(found.seldom) if found.seldom else None,
        found.stolen,
        found.quiet,
    )


def rounds(calls: Sequence[Call], probe: Probe, pairs: int, seldom: Call | None = None) -> Rounds:
    """`pairs` rounds in which each way is timed once, with a probe before and after each; now and then `seldom` too."""
    calls = list(calls) if seldom is None else [*calls, seldom]
    ways = len(calls) if seldom is None else len(calls) - 1
    for call in calls:
        _warm(call)
    repeats = [_repeats(call) for call in calls]
    found = Rounds([], [], 0, True)
    stolen, lost = 0, 0.0
    while len(found.seconds) < pairs:
        quiet = lost < WAIT_SECONDS
        start = time.perf_counter()
        if quiet and not probe.quiet():
            stolen += 1
            time.sleep(0.02)
            lost += time.perf_counter() - start
            continue
        sample = [_seconds(call, n) for call, n in zip(calls[:ways], repeats, strict=False)]
        timed = seldom is not None and len(found.seconds) % LIMIT_EVERY == 0
        bound = [_seconds(calls[-1], repeats[-1])] if timed else []
        if quiet and not probe.quiet():
            stolen += 1
            lost += time.perf_counter() - start
            continue
        found.seconds.append(sample)
        found.seldom.extend(bound)
    return found._replace(stolen=stolen, quiet=lost < WAIT_SECONDS)


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """Of neighbours in time: the median, the 20th and the 80th percentile."""
    found = sorted(a / b for a, b in zip(ours, theirs, strict=True))
    return found[len(found) // 2], found[len(found) // 5], found[len(found) * 4 // 5]


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def _warm(call: Call) -> None:
    start = time.perf_counter()
    for _ in range(3):
        call()
        if time.perf_counter() - start > WARM_SECONDS:
            return


def _repeats(call: Call) -> int:
    n = 1
    while (took := _seconds(call, n) * n) < SAMPLE_SECONDS:
        n = max(n + 1, int(n * min(8.0, 1.2 * SAMPLE_SECONDS / max(took, 1e-9))))
    return n


def _seconds(call: Call, n: int) -> float:
    start = time.perf_counter()
    for _ in range(n):
        call()
    return (time.perf_counter() - start) / n
