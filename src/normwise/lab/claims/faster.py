"""faster: how soon, and how much a bad start or a bad learning rate costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from normwise.lab.claim import WORST_LOSS, Claim, Evidence, bounded_loss
from normwise.lab.spec import Spec, expand
from normwise.lab.store import Run
from normwise.lab.verdict import Effect, lacks, log2_ratio

SIZE, RATES, STEPS = 64, [0.001, 0.01, 0.1, 1.0], 200
GOAL, WINDOW = 1.0, 20
FEWER, LESS = 0.5, 0.1
GUESSING = math.log(10)


def specs(seeds: int) -> list[Spec]:
    return [
        spec
        for task in ("mlp", "mlp-bad-start")
        for spec in expand(
            task, seeds=seeds, norms=["none", "batch"], batch_sizes=[SIZE], learning_rates=RATES, steps=STEPS
        )
    ]


def steps_to_goal(run: Run) -> float:
    """The first step at which the mean of the last WINDOW losses is below GOAL; the number of steps if none is."""
    losses = run.series["train/loss"].values if run.status == "done" else []
    for end in range(WINDOW, len(losses) + 1):
        if fmean(losses[end - WINDOW : end]) < GOAL:
            return end
    return float(run.identity["steps"])


def cost_of_rate(runs: Sequence[Run]) -> float:
    """By how much the worst learning rate's loss is above the best one's."""
    losses = [bounded_loss(run) for run in runs]
    return max(losses) - min(losses)


def effects(evidence: Evidence) -> Sequence[Effect]:
    soon = {norm: evidence.measure("mlp", norm, SIZE, steps_to_goal) for norm in ("none", "batch")}
    good = {norm: evidence.measure("mlp", norm, SIZE, bounded_loss) for norm in ("none", "batch")}
    start = {
        norm: evidence.measure("mlp-bad-start", norm, SIZE, bounded_loss) - good[norm] for norm in ("none", "batch")
    }
    rate = {norm: evidence.over_rates("mlp", norm, SIZE, cost_of_rate) for norm in ("none", "batch")}
    log_steps = [soon[norm].each(math.log2) for norm in ("none", "batch")]
    sooner = lacks(math.log2(WINDOW), *log_steps, worst=math.log2(STEPS))
    # What the net without norm can lose is what it has learned: up to the loss of guessing from a bad start, and up to
    # the one that counts as the worst at a rate at which it diverges.
    learned = good["none"].each(lambda loss: GUESSING - loss)
    below_worst = good["none"].each(lambda loss: WORST_LOSS - loss)
    steps, lost, at_rate = (
        "steps to a loss of 1 nat: log2(none / BN)",
        "training loss that a bad start adds: none - BN",
        "training loss that the worst rate adds: none - BN",
    )
    return [
        Effect(steps, "doublings", FEWER, log2_ratio(soon["none"], soon["batch"]), headroom=sooner),
        Effect(lost, "nats", LESS, start["none"] - start["batch"], headroom=learned),
        Effect(at_rate, "nats", LESS, rate["none"] - rate["batch"], headroom=below_worst),
    ]


CLAIM = Claim(
    id="faster",
    sentence="With BatchNorm a deep sigmoid net trains in fewer steps, and a bad initialisation or learning rate "
    "hurts less.",
    source="Ioffe & Szegedy 2015, sections 3.3 and 4.1",
    measured=f"On mlp at batch size {SIZE}, {STEPS} steps: steps until the mean loss of {WINDOW} batches is below "
    f"{GOAL:g} nat (all {STEPS} if it never is); the training loss at the end from weights of deviation 1 less that "
    f"from 0.1; and that at the worst learning rate of {', '.join(map(str, RATES))} less that at the best. A loss "
    f"above {WORST_LOSS:g} nats, or infinite, counts as that.",
    rule=f"Without norm at least 2^{FEWER:g} times the steps, and at least {LESS:g} nats more lost to the bad start "
    "and to the bad rate.",
    specs=specs,
    effects=effects,
)
