"""Timing on a noisy machine: ratios of neighbours in time, and no sample while a core is stolen."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

Call = Callable[[], object]

PAIRS = 15
WARM_SECONDS = 0.3  # three calls, or so long, before anything counts
LIMIT_EVERY = 3  # rounds: the limit has no part in the ratio
SAMPLE_SECONDS = 0.004  # long enough for the clock, short enough that little happens in between
STOLEN = 5.0  # a probe this many times slower than the best one seen means that another process has a core
WAIT_SECONDS = 30.0  # after so long, a busy machine is taken as it is, and the result says so


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


def compare(ours: Call, theirs: Call, limit: Call | None, probe: Probe) -> Ratio:
    """Ours, theirs, ours, theirs, ... with a probe before and after each round, and the limit in between."""
    calls = [ours, theirs] if limit is None else [ours, theirs, limit]
    for call in calls:
        _warm(call)
    repeats = [_repeats(call) for call in calls]
    rounds: list[list[float]] = []
    limits: list[float] = []
    stolen, quiet = 0, True
    deadline = time.perf_counter() + WAIT_SECONDS
    while len(rounds) < PAIRS:
        quiet = quiet and time.perf_counter() < deadline
        if quiet and not probe.quiet():
            stolen += 1
            time.sleep(0.02)
            continue
        sample = [_seconds(call, n) for call, n in zip((ours, theirs), repeats, strict=False)]
        bound = [_seconds(limit, repeats[-1])] if limit is not None and len(rounds) % LIMIT_EVERY == 0 else []
        if quiet and not probe.quiet():
            stolen += 1
            continue
        rounds.append(sample)
        limits += bound
    ratios = sorted(sample[0] / sample[1] for sample in rounds)
    middle = [sorted(column)[len(rounds) // 2] for column in zip(*rounds, strict=True)]
    return Ratio(
        ratios[len(ratios) // 2],
        ratios[len(ratios) // 5],
        ratios[len(ratios) * 4 // 5],
        middle[0],
        middle[1],
        sorted(limits)[len(limits) // 2] if limits else None,
        stolen,
        quiet,
    )


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
