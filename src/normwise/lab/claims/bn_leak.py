"""bn-leak: what BatchNorm tells a case of the others in its batch."""

from __future__ import annotations

from collections.abc import Sequence

from normwise.lab.claim import Claim, Evidence, last
from normwise.lab.spec import Spec, expand
from normwise.lab.verdict import Effect, Measured

SIZE, RATES, STEPS = 80, [0.01, 0.1], 300
GAP = 30
EQUAL = 0.05  # less than one case of the 960 that are looked at
CHANCE = 10
SHORT = {"layer": "LN", "group": "GN"}


def specs(seeds: int) -> list[Spec]:
    norms = ["batch", *SHORT]
    return expand("bn-leak", seeds=seeds, norms=norms, batch_sizes=[SIZE], learning_rates=RATES, steps=STEPS)


def points(evidence: Evidence, norm: str, mode: str) -> Measured:
    return 100 * evidence.measure("bn-leak", norm, SIZE, last(f"final/{mode}/accuracy"))


def effects(evidence: Evidence) -> Sequence[Effect]:
    training, evaluation = (points(evidence, "batch", mode) for mode in ("train-mode", "eval-mode"))
    # What evaluation can lose is what is known in training, above guessing.
    known = training.each(lambda right: right - CHANCE)
    what = "BN, accuracy on groups of one class, half of them black: train mode - eval mode"
    found = [Effect(what, "points", GAP, training - evaluation, headroom=known)]
    for norm, short in SHORT.items():
        training, evaluation = (points(evidence, norm, mode) for mode in ("train-mode", "eval-mode"))
        apart = (training - evaluation).each(abs)
        known = training.each(lambda right: right - CHANCE)
        found.append(Effect(f"{short}, the same: minus how far apart", "points", -EQUAL, -apart, headroom=known))
    return found


CLAIM = Claim(
    id="bn-leak",
    sentence="BatchNorm shows a case the others in its batch: where these tell the answer, the net learns to read them "
    "and not the case, and fails in evaluation. LayerNorm and GroupNorm show nothing.",
    source="He et al. 2020 (MoCo), section 3.3",
    measured=f"On bn-leak, {STEPS} batches of {SIZE} in groups of 8 cases of one class, over which BatchNorm takes its "
    "statistics and in which 4 pictures are black: accuracy on 960 held-out cases in such groups, in train mode less "
    f"eval mode, at the rate of {', '.join(map(str, RATES))} that the training loss chooses.",
    rule=f"At least {GAP} points for BatchNorm; the same number of cases, to {EQUAL:g} points, for LayerNorm and "
    "GroupNorm.",
    against="With groups drawn at random there is next to nothing to read, and BatchNorm's two modes differ by what "
    "`train-eval-gap` measures.",
    specs=specs,
    effects=effects,
)
