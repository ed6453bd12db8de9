"""Made-up runs: a store in which a claim must be supported, contradicted or left open."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from normwise.lab.claim import Claim
from normwise.lab.spec import Spec
from normwise.lab.store import Curve, Run

Values = dict[str, Sequence[float]]


def made_up(claim: Claim, seeds: int, series: Callable[[Spec, random.Random], Values]) -> list[Run]:
    """A finished run for everything the claim asks for; ``series`` gives the values, the generator depends on the run.

    ``train/loss`` is 1.5 at every step and ``final/accuracy`` 0.5 unless ``series`` says otherwise.
    """
    runs = []
    for spec in claim.needs(seeds):
        draws = random.Random(repr(spec))
        always: Values = {"train/loss": [1.5] * spec.steps, "time/step": [0.001], "final/accuracy": [0.5]}
        values = {**always, **series(spec, draws)}
        curves = {name: Curve(list(range(len(of))), list(of)) for name, of in values.items()}
        runs.append(Run(repr(spec), {**spec.identity()}, "done", "", "made up", curves))
    return runs
