"""rnn: how steadily recurrent nets train."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from normwise.lab.claim import Claim, Evidence, accuracy
from normwise.lab.spec import Spec, expand
from normwise.lab.store import Run
from normwise.lab.verdict import UNBOUNDED, Effect, lacks, log2_ratio

SIZE = 32
# Offered 0.01 as well, no norm took it in the LSTM: its training loss was higher for each of them.
RATES = {"rnn": [0.01, 0.03], "lstm": [0.03]}
STEPS = {"rnn": 150, "lstm": 100}
WINDOW = 11
STEADIER, BETTER = 0.5, 1


def specs(seeds: int) -> list[Spec]:
    norms = ["layer", "batch-per-step", "batch-time-average"]
    return [
        spec
        for task, steps in STEPS.items()
        for spec in expand(task, seeds=seeds, norms=norms, batch_sizes=[SIZE], learning_rates=RATES[task], steps=steps)
    ]


def roughness(run: Run) -> float:
    """Root mean square of the training loss about its mean over WINDOW steps around, in the first half of the steps."""
    if run.status != "done":
        return math.nan
    losses, reach = run.series["train/loss"].values, WINDOW // 2
    places = range(reach, len(losses) // 2)
    around = [losses[at] - fmean(losses[at - reach : at + reach + 1]) for at in places]
    return math.sqrt(fmean(value**2 for value in around)) if around else math.nan


def effects(evidence: Evidence) -> Sequence[Effect]:
    found = []
    for task in STEPS:
        batch, layer = (evidence.measure(task, norm, SIZE, roughness) for norm in ("batch-per-step", "layer"))
        what = f"{task}, roughness of the loss: log2(BN / LN)"
        found.append(Effect(what, "doublings", STEADIER, log2_ratio(batch, layer), headroom=UNBOUNDED))
        each, one = (
            100 * evidence.measure(task, f"batch-{norm}", SIZE, accuracy) for norm in ("per-step", "time-average")
        )
        room = lacks(100, each, one, worst=100 / 9)
        found.append(Effect(f"{task}, accuracy: per step - one for all", "points", BETTER, each - one, headroom=room))
    return found


CLAIM = Claim(
    id="rnn",
    sentence="In recurrent nets LayerNorm trains more steadily than BatchNorm; BatchNorm needs statistics per time "
    "step.",
    source="Ba et al. 2016; Cooijmans et al. 2016",
    measured=f"On rnn and lstm at batch size {SIZE}: the root mean square of the training loss about its running mean "
    f"over {WINDOW} steps, in the first half of the training, where it falls; and the held-out accuracy with running "
    "statistics for each step less that with one set for all.",
    rule=f"BatchNorm's loss is at least 2^{STEADIER:g} times as rough, and statistics per step are worth at least "
    f"{BETTER} point, in both nets.",
    specs=specs,
    effects=effects,
)
