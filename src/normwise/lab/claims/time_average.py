"""time-average: one set of running statistics for all time steps, or one for each."""

from __future__ import annotations

from collections.abc import Sequence

from normwise.lab.claim import Claim, Evidence, last
from normwise.lab.claims.rnn import RATES, SIZE, STEPS
from normwise.lab.spec import Spec, expand
from normwise.lab.verdict import Effect, lacks

MINIMUM = 0.05


def specs(seeds: int) -> list[Spec]:
    norms = ["batch-per-step", "batch-time-average"]
    return [
        spec
        for task, steps in STEPS.items()
        for spec in expand(task, seeds=seeds, norms=norms, batch_sizes=[SIZE], learning_rates=RATES[task], steps=steps)
    ]


def effects(evidence: Evidence) -> Sequence[Effect]:
    loss = last("final/longer-cut/loss")
    found = []
    for task in STEPS:
        one, each = (evidence.measure(task, f"batch-{norm}", SIZE, loss) for norm in ("time-average", "per-step"))
        what = f"{task}, held-out loss: one for all - one per step"
        found.append(Effect(what, "nats", MINIMUM, one - each, headroom=lacks(0, one, each)))
    return found


CLAIM = Claim(
    id="time-average",
    sentence="One population estimate shared by all time steps is worse than one per step.",
    source="Cooijmans et al. 2016",
    measured=f"On rnn and lstm at batch size {SIZE}, in eval mode: the loss on the 125 long held-out utterances, cut "
    "to 16 steps so that every step has statistics. Both nets are trained alike to the last bit.",
    rule=f"One estimate for all costs at least {MINIMUM:g} nats, in both nets.",
    specs=specs,
    effects=effects,
)
