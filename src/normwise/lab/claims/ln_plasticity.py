"""ln-plasticity: whether a net that has learned much can still learn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from normwise.lab.claim import Claim, Evidence
from normwise.lab.spec import Spec, expand
from normwise.lab.store import Run
from normwise.lab.verdict import Effect, Measured

SIZE, RATES, STEPS = 48, [0.001, 0.003], 20_000
TASKS, COUNTED = 50, 5
LESS = 5


def specs(seeds: int) -> list[Spec]:
    arms = {"plasticity": ["none", "layer"], "plasticity-decay": ["layer"]}
    return [
        spec
        for task, norms in arms.items()
        for spec in expand(task, seeds=seeds, norms=norms, batch_sizes=[SIZE], learning_rates=RATES, steps=STEPS)
    ]


def lost(run: Run) -> float:
    """Online accuracy (each batch before its update) on the first tasks less that on the last ones, in points."""
    return online(run, first=True) - online(run, first=False)


def online(run: Run, *, first: bool) -> float:
    """The mean over the first or the last ``COUNTED`` of the tasks, in points; NaN for a run that diverged."""
    if run.status != "done":
        return math.nan
    values = run.series["train/accuracy"].values
    count = len(values) * COUNTED // TASKS
    return 100 * fmean(values[:count] if first else values[-count:])


def effects(evidence: Evidence) -> Sequence[Effect]:
    def lost_by(task: str, norm: str) -> Measured:
        return evidence.measure(task, norm, SIZE, lost)

    none, layer, decayed = (
        lost_by("plasticity", "none"),
        lost_by("plasticity", "layer"),
        lost_by("plasticity-decay", "layer"),
    )
    # A net that loses nothing leaves nothing to be lost less.
    room, room_of_layer = (arm.each(lambda points: max(points, 0.0)) for arm in (none, layer))
    return [
        Effect("points that tasks 46-50 are below 1-5: none - LN", "points", LESS, none - layer, headroom=room),
        Effect("the same: LN - LN with decay", "points", LESS, layer - decayed, headroom=room_of_layer),
    ]


CLAIM = Claim(
    id="ln-plasticity",
    sentence="A net that is trained on one task after another loses the ability to learn; with LayerNorm it loses "
    "less, and with LayerNorm and weight decay less still.",
    source="Lyle et al. 2023, 2024",
    measured=f"On plasticity and plasticity-decay (1,200 digits, new random labels every 400 of {STEPS:,} steps; Adam, "
    f"decay 0.5), at batch size {SIZE} and the rate of {', '.join(map(str, RATES))} at which the last tenth of the "
    f"training has the lowest loss: accuracy of each batch before its update, mean over the first {COUNTED} tasks less "
    f"that over the last {COUNTED} of {TASKS}.",
    rule=f"LayerNorm loses at least {LESS} points less than no norm, and with decay at least {LESS} less again.",
    against="Kumar et al. 2023 find LayerNorm alone behind regularization towards the initial weights.",
    specs=specs,
    effects=effects,
)
