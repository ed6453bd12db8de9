"""transformer: which norm on sequences of varying length."""

from __future__ import annotations

from collections.abc import Sequence

from normwise.lab.claim import Claim, Evidence, accuracy
from normwise.lab.spec import Spec, expand
from normwise.lab.verdict import Effect, lacks

SIZE, STEPS, RATES = 32, 150, [0.003, 0.01]
BETTER, PART = 1, 0.5


def specs(seeds: int) -> list[Spec]:
    norms = ["batch", "batch-masked", "layer"]
    return expand("transformer", seeds=seeds, norms=norms, batch_sizes=[SIZE], learning_rates=RATES, steps=STEPS)


def effects(evidence: Evidence) -> Sequence[Effect]:
    batch, masked, layer = (
        100 * evidence.measure("transformer", norm, SIZE, accuracy) for norm in ("batch", "batch-masked", "layer")
    )
    return [
        Effect("held-out accuracy, LN - BN", "points", BETTER, layer - batch, headroom=lacks(100, layer, batch)),
        Effect("held-out accuracy, masked BN - BN", "points", PART, masked - batch, headroom=lacks(100, masked, batch)),
    ]


CLAIM = Claim(
    id="transformer",
    sentence="In a transformer on sequences of varying length LayerNorm beats BatchNorm; masked statistics explain "
    "part of it.",
    source="tutorials; Shen et al. 2020 (PowerNorm)",
    measured=f"Held-out accuracy of transformer at batch size {SIZE} after {STEPS} steps, each norm at its best "
    "learning rate. BN takes its statistics over all positions, masked BN over the valid ones.",
    rule=f"LayerNorm is at least {BETTER} point above BN, masked BN at least {PART:g} above BN.",
    specs=specs,
    effects=effects,
)
