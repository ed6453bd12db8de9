"""norm-only: how much the gains and biases of BatchNorm learn alone."""

from __future__ import annotations

from collections.abc import Sequence

from normwise.lab.claim import Claim, Evidence, accuracy
from normwise.lab.spec import Spec, expand
from normwise.lab.verdict import Effect, lacks

SIZE, RATES, STEPS = 32, [0.1, 0.3], 800
MORE = 20
HEADS = {"alone": "last linear map as it was drawn", "and-head": "last linear map trained too"}


def specs(seeds: int) -> list[Spec]:
    return [
        spec
        for head in HEADS
        for what in ("norms", "weights")
        for spec in expand(
            f"{what}-{head}", seeds=seeds, norms=["batch"], batch_sizes=[SIZE], learning_rates=RATES, steps=STEPS
        )
    ]


def effects(evidence: Evidence) -> Sequence[Effect]:
    found = []
    for head, words in HEADS.items():
        norms, weights = (
            100 * evidence.measure(f"{what}-{head}", "batch", SIZE, accuracy) for what in ("norms", "weights")
        )
        # What gains and biases can be better by is what the weights leave.
        room = lacks(100, weights)
        what = f"held-out accuracy, {words}: gains and biases - two weights a channel"
        found.append(Effect(what, "points", MORE, norms - weights, headroom=room))
    return found


CLAIM = Claim(
    id="norm-only",
    sentence="Trained alone, in a net of random weights, BatchNorm's gains and biases learn much, and far more than as "
    "many of the weights.",
    source="Frankle et al. 2021",
    measured=f"On norms-alone and weights-alone (and norms-and-head, weights-and-head), a residual conv net of 208 "
    f"normalized channels, {STEPS} steps at batch size {SIZE}, each at the rate of {', '.join(map(str, RATES))} that "
    "its training loss chooses: held-out accuracy where gain and bias of each channel are trained, less that where two "
    "weights of its kernel are, drawn at random.",
    rule=f"At least {MORE} points, with the last linear map as it was drawn and with it trained.",
    against="Frankle et al.'s differences are of deep nets; in shallow ones, or with a trained head, they shrink.",
    specs=specs,
    effects=effects,
)
