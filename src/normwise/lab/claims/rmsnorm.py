"""rmsnorm: is RMSNorm as good as LayerNorm?

A seed's runs take about 40 s on two cores (by the time of a step); those of LayerNorm are shared.
"""

from __future__ import annotations

from collections.abc import Sequence

from normwise.lab.claim import Claim, Evidence
from normwise.lab.deep_text import PRE, SETTINGS, SIZE, bits, room, trained
from normwise.lab.spec import Spec
from normwise.lab.verdict import Effect

APART = 0.02


def specs(seeds: int) -> list[Spec]:
    return trained(PRE, seeds, "layer", "rms")


def effects(evidence: Evidence) -> Sequence[Effect]:
    layer, rms = (evidence.measure(PRE, norm, SIZE, bits) for norm in ("layer", "rms"))
    return [
        Effect("held-out bits per character, LN - RMSNorm", "bits", -APART, layer - rms, headroom=room(layer, rms)),
        Effect("held-out bits per character, RMSNorm - LN", "bits", -APART, rms - layer, headroom=room(layer, rms)),
    ]


CLAIM = Claim(
    id="rmsnorm",
    sentence="RMSNorm, which subtracts no mean, gives the same quality as LayerNorm.",
    source="Zhang & Sennrich 2019",
    measured=f"Held-out bits per character of pre-LN transformers: {SETTINGS}. All norms are LayerNorm or all RMSNorm. "
    "That it takes less time is a matter of kernels, which `python -m benchmarks` measures.",
    rule=f"Neither needs more than {APART:g} bits per character more than the other.",
    specs=specs,
    effects=effects,
    against="Where weights have a mean other than 0 the mean of the inputs is most of what RMSNorm sees.",
)
