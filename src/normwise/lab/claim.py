"""What a claim is, and how stored runs are turned into its verdict. The claims themselves are in ``claims/``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from normwise.lab.score import Row, score, training_loss
from normwise.lab.spec import Spec
from normwise.lab.store import Run
from normwise.lab.verdict import CANNOT_TELL, Check, Effect, Measured, combined

Part = Effect | Check


class Evidence:
    """The runs of one claim. Of each task, norm and batch size those count whose learning rate the training loss
    chose (``score.py``), unless a rate is asked for."""

    def __init__(self, runs: Iterable[Run]) -> None:
        self._runs = list(runs)
        self._rows = {(row.task, row.norm, row.batch_size): row for row in score(self._runs)}

    def measure(
        self, task: str, norm: str, size: int, quantity: Callable[[Run], float], *, rate: float | None = None
    ) -> Measured:
        """``quantity`` of each seed's run. A run that has none (it diverged, or its norm is undefined) is left out."""
        values = {run.identity["seed"]: (quantity(run), run.key) for run in self._of(task, norm, size, rate)}
        kept = {seed: pair for seed, pair in sorted(values.items()) if not math.isnan(pair[0])}
        return Measured({seed: value for seed, (value, _) in kept.items()}, tuple(key for _, key in kept.values()))

    def over_rates(self, task: str, norm: str, size: int, quantity: Callable[[Sequence[Run]], float]) -> Measured:
        """``quantity`` of each seed's runs at all learning rates that were offered, from the lowest."""
        by_seed: dict[int, list[Run]] = {}
        for run in sorted(self._runs, key=lambda run: run.identity["learning_rate"]):
            if _cell(run) == (task, norm, size):
                by_seed.setdefault(run.identity["seed"], []).append(run)
        values = {seed: quantity(runs) for seed, runs in sorted(by_seed.items())}
        return Measured(values, tuple(run.key for runs in by_seed.values() for run in runs))

    def _of(self, task: str, norm: str, size: int, rate: float | None) -> Sequence[Run]:
        if rate is not None:
            return [r for r in self._runs if _cell(r) == (task, norm, size) and r.identity["learning_rate"] == rate]
        row: Row | None = self._rows.get((task, norm, size))
        return row.runs if row else ()


def _cell(run: Run) -> tuple[str, str, int]:
    return run.identity["task"], run.identity["norm"], run.identity["batch_size"]


def last(name: str) -> Callable[[Run], float]:
    """The last value of a series, NaN for a run that has none or did not finish."""
    return lambda run: run.series[name].values[-1] if run.status == "done" and name in run.series else math.nan


def average(name: str) -> Callable[[Run], float]:
    """The mean of a series over the run, NaN for a run that has none or did not finish."""
    return lambda run: fmean(run.series[name].values) if run.status == "done" and name in run.series else math.nan


accuracy = last("final/accuracy")
"""Share of all held-out cases that are right after the last step, in eval mode."""

WORST_LOSS = 5.0


def bounded_loss(run: Run) -> float:
    """The training loss at the end; one above ``WORST_LOSS`` nats, or infinite, counts as that."""
    return min(training_loss(run), WORST_LOSS)


@dataclass(frozen=True)
class Claim:
    """A sentence that somebody has published, and the rule that says what runs here make of it.

    ``measured`` and ``rule`` say in words what ``effects`` does, and were written down before its first result.
    An exact claim has ``checks``, which compute; one that needs runs has ``specs`` (for a number of seeds) and
    ``effects``, a pure function of the stored runs of these specs. A claim may have both.
    """

    id: str
    sentence: str
    source: str
    measured: str
    rule: str
    checks: Callable[[], Sequence[Check]] | None = None
    specs: Callable[[int], list[Spec]] | None = None
    effects: Callable[[Evidence], Sequence[Effect]] | None = None
    against: str = ""
    """Who has found otherwise, and where."""

    @property
    def kind(self) -> str:
        if self.effects is None:
            return "exact"
        return "run" if self.checks is None else "exact + run"

    def needs(self, seeds: int) -> list[Spec]:
        """The runs that the rule reads."""
        return self.specs(seeds) if self.specs else []

    def parts(self, runs: Iterable[Run]) -> tuple[Part, ...]:
        """What is measured, computed or read from ``runs``."""
        computed = self.checks() if self.checks else ()
        return (*computed, *(self.effects(Evidence(runs)) if self.effects else ()))


@dataclass(frozen=True)
class Judged:
    """A claim with its verdict here. ``wanted`` is how many runs its rule asks for, ``found`` how many there were."""

    claim: Claim
    parts: tuple[Part, ...]
    wanted: int
    found: int

    @property
    def verdict(self) -> str:
        return combined(part.verdict for part in self.parts)

    @property
    def reason(self) -> str:
        """Why the claim cannot be told here; "" for another verdict."""
        return self.deciding.reason if self.deciding and self.verdict == CANNOT_TELL else ""

    @property
    def runs(self) -> tuple[str, ...]:
        """The keys of the runs behind it."""
        return tuple(dict.fromkeys(key for part in self.parts for key in part.runs))

    @property
    def deciding(self) -> Part | None:
        """The part that stands for the claim: the first one whose verdict is the claim's."""
        return next((part for part in self.parts if part.verdict == self.verdict), None)


def judge(claim: Claim, runs: Iterable[Run], seeds: int) -> Judged:
    """The verdict from ``runs``: of these, those that ``claim.needs(seeds)`` asks for."""
    wanted = {_plain(spec.identity()) for spec in claim.needs(seeds)}
    mine = [run for run in runs if _plain(run.identity) in wanted]
    return Judged(claim, claim.parts(mine), len(wanted), len(mine))


def _plain(identity: Mapping[str, object]) -> tuple[object, ...]:
    return tuple(identity[name] for name in ("task", "norm", "batch_size", "learning_rate", "seed", "steps"))


def as_json(judged: Judged) -> dict[str, object]:
    """Everything about the verdict as plain values."""
    claim = judged.claim
    return {
        "id": claim.id,
        "verdict": judged.verdict,
        "reason": judged.reason,
        "sentence": claim.sentence,
        "source": claim.source,
        "kind": claim.kind,
        "measured": claim.measured,
        "rule": claim.rule,
        "against": claim.against,
        "parts": [_part_as_json(part) for part in judged.parts],
        "runs": list(judged.runs),
        "runs_wanted": judged.wanted,
        "runs_found": judged.found,
    }


def _part_as_json(part: Part) -> dict[str, object]:
    if isinstance(part, Check):
        return {
            "what": part.what,
            "verdict": part.verdict,
            "value": part.value,
            "limit": part.limit,
            "at_most": part.at_most,
        }
    return {
        "what": part.what,
        "verdict": part.verdict,
        "unit": part.unit,
        "minimum": part.minimum,
        "mean": part.mean,
        "interval_95": part.interval,
        "by_seed": dict(part.measured.by_seed),
        **_room_as_json(part),
        "power": part.power,
        "reason": part.reason,
        "seeds_needed": part.seeds_needed,
        "would_decide": part.would_decide,
        "runs": list(part.runs),
    }


def _room_as_json(effect: Effect) -> dict[str, object]:
    """The mean headroom, or why there is no ceiling."""
    if isinstance(effect.headroom, str):
        return {"headroom": None, "no_ceiling": effect.headroom}
    return {"headroom": effect.room, "no_ceiling": ""}
