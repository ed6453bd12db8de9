"""transformer: which norm on sequences of varying length."""

from __future__ import annotations

from collections.abc import Sequence

from normwise.lab.claim import ENTROPY, Claim, Evidence, bits
from normwise.lab.spec import Spec, expand
from normwise.lab.verdict import Effect, lacks

TASK, SIZE, STEPS, RATES = "charlm-ragged", 16, 300, [0.001, 0.003, 0.01]
BETTER, PART = 0.05, 0.02


def specs(seeds: int) -> list[Spec]:
    norms = ["batch", "batch-masked", "layer"]
    return expand(TASK, seeds=seeds, norms=norms, batch_sizes=[SIZE], learning_rates=RATES, steps=STEPS)


def effects(evidence: Evidence) -> Sequence[Effect]:
    batch, masked, layer = (evidence.measure(TASK, norm, SIZE, bits) for norm in ("batch", "batch-masked", "layer"))
    return [
        Effect("held-out text: BN - LN", "bits", BETTER, batch - layer, headroom=lacks(ENTROPY, layer, batch)),
        Effect("held-out text: BN - masked BN", "bits", PART, batch - masked, headroom=lacks(ENTROPY, masked, batch)),
    ]


CLAIM = Claim(
    id="transformer",
    sentence="In a transformer on sequences of varying length LayerNorm beats BatchNorm; masked statistics explain "
    "part of it.",
    source="tutorials; Shen et al. 2020 (PowerNorm)",
    measured=f"Bits per character of held-out text on {TASK} (a causal transformer on pieces of 8 to 64 characters) "
    f"at batch size {SIZE} after {STEPS} steps, each norm at its best learning rate of {', '.join(map(str, RATES))}. "
    "BN takes its statistics over all positions, masked BN over the valid ones.",
    rule=f"LayerNorm takes at least {BETTER:g} bits fewer than BN, masked BN at least {PART:g} fewer.",
    specs=specs,
    effects=effects,
)
