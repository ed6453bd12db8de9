"""cnn: which norm in a conv net."""

from __future__ import annotations

from collections.abc import Sequence

from normwise.lab.claim import Claim, Evidence, accuracy
from normwise.lab.spec import Spec, expand
from normwise.lab.verdict import Effect, lacks

SIZE, STEPS, RATES = 64, 150, [0.005, 0.03]
MINIMUM = 0.5


def specs(seeds: int) -> list[Spec]:
    norms = ["none", "batch", "layer"]
    return expand("cnn", seeds=seeds, norms=norms, batch_sizes=[SIZE], learning_rates=RATES, steps=STEPS)


def effects(evidence: Evidence) -> Sequence[Effect]:
    none, batch, layer = (100 * evidence.measure("cnn", norm, SIZE, accuracy) for norm in ("none", "batch", "layer"))
    return [
        Effect(f"held-out accuracy, {what}", "points", MINIMUM, a - b, headroom=lacks(100, a, b, worst=10))
        for what, a, b in (("BN - LN", batch, layer), ("LN - none", layer, none))
    ]


CLAIM = Claim(
    id="cnn",
    sentence="In conv nets at a good batch size BatchNorm beats LayerNorm, and LayerNorm beats none.",
    source="Ba et al. 2016, section 6.7",
    measured=f"Held-out accuracy of cnn at batch size {SIZE} after {STEPS} steps, each norm at its best learning rate.",
    rule=f"At least {MINIMUM:g} points each.",
    specs=specs,
    effects=effects,
)
