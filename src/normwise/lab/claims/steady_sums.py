"""steady-sums: the size of the summed inputs from step to step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean

from normwise.lab.claim import Claim, Evidence
from normwise.lab.claims.rnn import RATES, SIZE, STEPS
from normwise.lab.spec import Spec, expand
from normwise.lab.store import Run
from normwise.lab.verdict import UNBOUNDED, Effect

ENDS = 3
DRIFT = 0.25


def specs(seeds: int) -> list[Spec]:
    return expand(
        "rnn", seeds=seeds, norms=["none", "layer"], batch_sizes=[SIZE], learning_rates=RATES["rnn"], steps=STEPS["rnn"]
    )


def drift(mode: str) -> Callable[[Run], float]:
    """|log2(size at the last steps that training has / size at the first)| of the summed inputs, after training."""

    def of(run: Run) -> float:
        name = f"over-time/summed/{mode}/end"
        if name not in run.series:
            return math.nan
        sizes = run.series[name].values[: int(run.series["train/longest"].values[0])]
        return abs(math.log2(fmean(sizes[-ENDS:]) / fmean(sizes[:ENDS])))

    return of


def effects(evidence: Evidence) -> Sequence[Effect]:
    found = []
    for mode in ("train", "eval"):
        none, layer = (evidence.measure("rnn", norm, SIZE, drift(mode)) for norm in ("none", "layer"))
        found.append(Effect(f"{mode} mode, drift without norm", "doublings", DRIFT, none, headroom=UNBOUNDED))
        found.append(Effect(f"{mode} mode, drift of LN, negated", "doublings", -DRIFT, -layer, headroom=UNBOUNDED))
    return found


CLAIM = Claim(
    id="steady-sums",
    sentence="In an RNN without norm the size of the summed inputs drifts with t; LayerNorm holds it, in training "
    "and inference.",
    source="Ba et al. 2016, section 3.1",
    measured=f"On rnn at batch size {SIZE}, after training: root mean square of what tanh sees (behind the norm), "
    f"mean of steps 14 to 16 over mean of steps 1 to {ENDS}, as |log2|, in both modes.",
    rule=f"Without norm at least {DRIFT:g} doublings; with LayerNorm at most that.",
    specs=specs,
    effects=effects,
)
