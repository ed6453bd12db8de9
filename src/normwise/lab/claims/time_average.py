"""time-average: one set of running statistics for all time steps, or one for each."""

from __future__ import annotations

from collections.abc import Sequence

from normwise.lab.claim import Claim, Evidence, last
from normwise.lab.claims.rnn import RATES, SIZE, STEPS
from normwise.lab.spec import Spec, expand
from normwise.lab.verdict import Effect

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
    return [
        Effect(
            f"{task}, held-out loss: one for all - one per step",
            "nats",
            MINIMUM,
            evidence.measure(task, "batch-time-average", SIZE, loss)
            - evidence.measure(task, "batch-per-step", SIZE, loss),
        )
        for task in STEPS
    ]


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
