"""dyt: is tanh in LayerNorm's place no worse?

A seed's runs take about 85 s on two cores (by the time of a step); those of LayerNorm are shared.
"""

from __future__ import annotations

from collections.abc import Sequence

from normwise.lab.claim import Claim, Evidence
from normwise.lab.deep_text import PRE, SETTINGS, SIZE, bits, of_best_dyt, room, trained
from normwise.lab.norms import DYT_ALPHAS
from normwise.lab.spec import Spec
from normwise.lab.verdict import Effect

WORSE = 0.02


def specs(seeds: int) -> list[Spec]:
    return trained(PRE, seeds, "layer", *DYT_ALPHAS)


def effects(evidence: Evidence) -> Sequence[Effect]:
    layer = evidence.measure(PRE, "layer", SIZE, bits)
    dyt = of_best_dyt(evidence, PRE, bits)
    what = "held-out bits per character, LN - DyT"
    return [Effect(what, "bits", -WORSE, layer - dyt, headroom=room(layer, dyt))]


CLAIM = Claim(
    id="dyt",
    sentence="A transformer with tanh(alpha x) in LayerNorm's place, with gain and bias, is no worse.",
    source="Zhu et al. 2025 (DyT)",
    measured=f"Held-out bits per character of pre-LN transformers: {SETTINGS}. All norms are LayerNorm or all DyT, "
    "alpha from 0.5, 1 or 2, whichever gave the lowest training loss.",
    rule=f"DyT needs at most {WORSE:g} bits per character more than LayerNorm.",
    specs=specs,
    effects=effects,
    against="arXiv 2604.23434: gains at 1M tokens are gone at 118M. DyT fails in BatchNorm's place (Zhu et al. 2025).",
)
