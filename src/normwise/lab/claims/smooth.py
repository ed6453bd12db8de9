"""smooth: how far the loss and its gradient change along the gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean

from normwise.lab.claim import Claim, Evidence
from normwise.lab.spec import Spec, expand
from normwise.lab.store import Run
from normwise.lab.verdict import UNBOUNDED, Effect, log2_ratio

SIZE, RATE, STEPS = 64, 0.01, 300
LESS = 1
WALKS = {
    "loss": "steps of equal rates, range of the loss",
    "gradient": "steps of equal rates, change of the gradient",
    "relative-loss": "steps relative to the weights, range of the loss",
    "relative-gradient": "steps relative to the weights, relative change of the gradient",
}


def specs(seeds: int) -> list[Spec]:
    norms = ["none", "batch"]
    return expand("smooth", seeds=seeds, norms=norms, batch_sizes=[SIZE], learning_rates=[RATE], steps=STEPS)


def geometric(name: str) -> Callable[[Run], float]:
    """The geometric mean of a series over the looks after the start; infinite values count as 1e6."""

    def of(run: Run) -> float:
        series = run.series.get(name)
        if run.status != "done" or series is None:
            return math.nan
        later = [min(v, 1e6) for step, v in zip(series.steps, series.values, strict=True) if step > 0 and v > 0]
        return math.exp(fmean(map(math.log, later))) if later else math.nan

    return of


def effects(evidence: Evidence) -> Sequence[Effect]:
    found = []
    for walk, words in WALKS.items():
        none, batch = (evidence.measure("smooth", n, SIZE, geometric(f"along/{walk}")) for n in ("none", "batch"))
        what = f"{words}: log2(none / BN)"
        found.append(Effect(what, "doublings", LESS, log2_ratio(none, batch), headroom=UNBOUNDED))
    return found


CLAIM = Claim(
    id="smooth",
    sentence="BatchNorm makes the loss smoother: along the gradient the loss varies less, and the gradient itself "
    "changes less.",
    source="Santurkar et al. 2018, section 3.1",
    measured=f"On smooth at batch size {SIZE} and a rate of {RATE:g}, {STEPS} steps: the range of the loss in train "
    "mode and the largest change of its gradient on a walk along the gradient, of rates up to 0.4, the same for both "
    "nets; and of a length up to 0.02 of the weights', the change then relative to the gradient. Geometric mean over "
    "the looks after the start.",
    rule=f"Each at least {LESS} doubling smaller with BatchNorm.",
    against="A net without norm has larger gradients, so a walk of equal rates takes it farther: the walks relative to "
    "the weights leave that out. Yang et al. 2019 find the gradients of deep BatchNorm nets exploding at the start.",
    specs=specs,
    effects=effects,
)
