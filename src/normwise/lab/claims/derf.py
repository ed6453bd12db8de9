"""derf: does erf in LayerNorm's place beat LayerNorm, and tanh there?

A seed's runs take about 105 s on two cores (by the time of a step); all but Derf's are shared.
"""

from __future__ import annotations

from collections.abc import Sequence

from normwise.lab.claim import Claim, Evidence
from normwise.lab.deep_text import PRE, SETTINGS, SIZE, bits, of_best_dyt, room, trained
from normwise.lab.norms import DYT_ALPHAS
from normwise.lab.spec import Spec
from normwise.lab.verdict import Effect

BETTER = 0.01


def specs(seeds: int) -> list[Spec]:
    return trained(PRE, seeds, "layer", "derf", *DYT_ALPHAS)


def effects(evidence: Evidence) -> Sequence[Effect]:
    layer, derf = (evidence.measure(PRE, norm, SIZE, bits) for norm in ("layer", "derf"))
    dyt = of_best_dyt(evidence, PRE, bits)
    return [
        Effect("held-out bits per character, LN - Derf", "bits", BETTER, layer - derf, headroom=room(layer, derf)),
        Effect("held-out bits per character, DyT - Derf", "bits", BETTER, dyt - derf, headroom=room(dyt, derf)),
    ]


CLAIM = Claim(
    id="derf",
    sentence="A transformer with erf(alpha x + s) in LayerNorm's place beats one with LayerNorm or tanh there.",
    source="Chen et al. 2025 (Derf)",
    measured=f"Held-out bits per character of pre-LN transformers: {SETTINGS}. All norms are LayerNorm, Derf or "
    "DyT. erf is nearly tanh(1.2 x), so DyT is offered larger alphas as the control: of 0.5, 1 and 2 the one that gave "
    "the lowest training loss; Derf has the paper's 0.5.",
    rule=f"Derf needs at least {BETTER:g} bits per character less than LayerNorm, and than DyT.",
    specs=specs,
    effects=effects,
    against="The paper's own GPT-2 has a loss of 2.94 with Derf and with LayerNorm.",
)
