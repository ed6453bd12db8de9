"""precise-bn: running averages lag behind weights that move fast."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean

from normwise.lab.claim import Claim, Evidence, last
from normwise.lab.spec import Spec, expand
from normwise.lab.store import Run
from normwise.lab.verdict import Effect, lacks

SIZE, RATE, STEPS = 32, 0.3, 600
LAG, AT_END = 0.05, 0.01


def specs(seeds: int) -> list[Spec]:
    return expand("precise-bn", seeds=seeds, norms=["batch"], batch_sizes=[SIZE], learning_rates=[RATE], steps=STEPS)


def halfway(by: str) -> Callable[[Run], float]:
    """The mean loss over the looks in the first half, while the rate is constant; the start is none of them."""

    def of(run: Run) -> float:
        if run.status != "done":
            return math.nan
        series = run.series[f"lag/{by}"]
        return fmean(v for step, v in zip(series.steps, series.values, strict=True) if 0 < step <= STEPS // 2)

    return of


def effects(evidence: Evidence) -> Sequence[Effect]:
    running, again = (evidence.measure("precise-bn", "batch", SIZE, halfway(by)) for by in ("running", "recalibrated"))
    at_end = [evidence.measure("precise-bn", "batch", SIZE, last(f"lag/{by}")) for by in ("running", "recalibrated")]
    # Guessing has ln 10 nats: what a net has not learned, lagging statistics cannot take from it.
    learned = at_end[1].each(lambda loss: math.log(10) - loss)
    return [
        Effect(
            "at the high rate, held-out loss: running averages - re-estimated",
            "nats",
            LAG,
            running - again,
            headroom=lacks(0, running),
        ),
        Effect("at rate 0, the same: minus it", "nats", -AT_END, at_end[1] - at_end[0], headroom=learned),
    ]


CLAIM = Claim(
    id="precise-bn",
    sentence="BatchNorm's running averages lag behind: while the learning rate is high, statistics re-estimated with "
    "the present weights evaluate better; once it has fallen they make no difference.",
    source="Wu & Johnson 2021, section 3",
    measured=f"On precise-bn at batch size {SIZE} and a rate of {RATE:g} for half of {STEPS} steps, which then falls "
    "to 0 on a line: the held-out loss by running averages less that after `recalibrate` on the training cases, mean "
    "over the looks of the first half, and at the end.",
    rule=f"At least {LAG:g} nats in the first half, at most {AT_END:g} at the end.",
    against="Wu & Johnson themselves: with small steps or a settled net averages are as good.",
    specs=specs,
    effects=effects,
)
