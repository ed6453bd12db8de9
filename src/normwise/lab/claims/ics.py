"""ics: does BatchNorm reduce internal covariate shift?"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean

from normwise.lab.claim import Claim, Evidence
from normwise.lab.spec import Spec, expand
from normwise.lab.store import Run
from normwise.lab.verdict import UNBOUNDED, Effect, log2_ratio

SIZE = 64
NETS = {"mlp": (0.1, 200), "cnn": (0.03, 150)}
LEAST = 0.5


def specs(seeds: int) -> list[Spec]:
    return [
        spec
        for task, (rate, steps) in NETS.items()
        for spec in expand(
            task, seeds=seeds, norms=["none", "batch"], batch_sizes=[SIZE], learning_rates=[rate], steps=steps
        )
    ]


def shift(kind: str) -> Callable[[Run], float]:
    """Geometric mean, over the layers and the looks, of a series of ``shift.py``."""

    def of(run: Run) -> float:
        found = [v for name, s in run.series.items() if name.startswith(f"shift/{kind}/") for v in s.values if v > 0]
        return math.exp(fmean(map(math.log, found))) if found and run.status == "done" else math.nan

    return of


def effects(evidence: Evidence) -> Sequence[Effect]:
    found = []
    for kind, words in (("gradient", "change of the gradient"), ("inputs", "drift of the inputs")):
        for task, (rate, _) in NETS.items():
            batch, none = (evidence.measure(task, n, SIZE, shift(kind), rate=rate) for n in ("batch", "none"))
            what = f"{task}, {words} by an update: log2(BN / none)"
            found.append(Effect(what, "doublings", -LEAST, log2_ratio(batch, none), headroom=UNBOUNDED))
    return found


CLAIM = Claim(
    id="ics",
    sentence="BatchNorm does not reduce internal covariate shift, as gradient change and as distribution drift.",
    source="Santurkar et al. 2018",
    measured=f"On mlp and cnn at batch size {SIZE} and the same learning rate ({NETS['mlp'][0]:g} and "
    f"{NETS['cnn'][0]:g}): how much an update of the layers before changes a layer's gradient (relative; their "
    "definition 2.1), and how far it moves the distribution of the layer's inputs (Wasserstein distance over "
    "standard deviation); geometric mean over layers and looks.",
    rule=f"BatchNorm's shift is at least 2^-{LEAST:g} times that without norm, in both readings and both nets.",
    specs=specs,
    effects=effects,
)
