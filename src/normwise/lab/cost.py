"""What a claim's runs cost, and what was recorded of the claims when docs/claims.json was made."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from normwise.lab.claim import Claim
from normwise.lab.errors import LabError
from normwise.lab.spec import Spec
from normwise.lab.store import Run

LOOKS_ADD = 1.25
"""A run's seconds over those of its training steps: looks at held-out cases and the loading of data come on top."""
SECONDS_A_STEP = 0.01
"""Of a run about which nothing is known."""

# Beside the package where it was installed from a wheel, in docs/ where it runs from its sources.
_PLACES = (Path(__file__).parent / "data" / "claims.json", Path(__file__).parents[3] / "docs" / "claims.json")


def recorded() -> Mapping[str, Mapping[str, Any]]:
    """The recorded claims by id, as ``as_json`` of ``record.py`` made them; none where no file is.

    Raises:
        LabError: the file is damaged.
    """
    path = next((path for path in _PLACES if path.is_file()), None)
    return {} if path is None else read_record(path)


@functools.cache
def read_record(path: Path) -> Mapping[str, Mapping[str, Any]]:
    """The claims by id of a file that ``normwise claims --json`` or ``scripts/make_claims_page.py`` wrote.

    Raises:
        LabError: it cannot be read, or is something else.
    """
    try:
        found = json.loads(path.read_text("utf-8"))
        claims: dict[str, Mapping[str, Any]] = {claim["id"]: claim for claim in found["claims"]}
        for claim in claims.values():
            if not isinstance(claim["verdict"], str):
                raise TypeError
        return claims
    except OSError as error:
        raise LabError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError):
        raise LabError(
            f"{path} is no record of claims: expected the JSON that `normwise claims --json > FILE` writes"
        ) from None


class Costs:
    """Seconds of runs on one core: measured where the store has runs like them, else from the record."""

    def __init__(self, runs: Iterable[Run], record: Mapping[str, Mapping[str, Any]]) -> None:
        self._measured: dict[tuple[object, ...], list[float]] = {}
        self._record = record
        for run in runs:
            if "time/step" in run.series:
                one = run.identity
                a_step = LOOKS_ADD * median(
                    run.series["time/step"].values
                )  # a mean would count what else ran meanwhile
                for like in _likes(*(one[name] for name in ("task", "norm", "batch_size", "learning_rate", "steps"))):
                    self._measured.setdefault(like, []).append(a_step)

    def seconds(self, claim: Claim, specs: Sequence[Spec]) -> float:
        """Of these runs of a claim, one after the other."""
        return sum(self._of(claim, spec) for spec in specs)

    def a_seed(self, claim: Claim) -> float:
        """Of all runs that one more seed takes."""
        return self.seconds(claim, claim.needs(1))

    def _of(self, claim: Claim, spec: Spec) -> float:
        for like in _likes(spec.task, spec.norm, spec.batch_size, spec.learning_rate, spec.steps):
            if like in self._measured:
                return spec.steps * fmean(self._measured[like])
        known = self._record.get(claim.id, {}).get("seconds_a_seed")
        if isinstance(known, (int, float)) and known > 0:
            return known * spec.steps / sum(spec.steps for spec in claim.needs(1))
        return spec.steps * SECONDS_A_STEP


def _likes(task: str, norm: str, size: int, rate: float, steps: int) -> list[tuple[object, ...]]:
    """What a run is like, the nearest first: of one setting a step takes about the same whatever rate and length."""
    return [(task, norm, size, rate, steps), (task, norm, size), (task, size)]


def in_words(seconds: float) -> str:
    """As in "40 s", "12 minutes", "3.5 hours"."""
    if seconds < 100:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
