"""peri-ln: do norms before and after each sublayer bound the residual stream and train better?

A seed's runs take about 40 s on two cores (by the time of a step); those of pre-LN are shared.
"""

from __future__ import annotations

from collections.abc import Sequence

from normwise.lab.claim import Claim, Evidence, last
from normwise.lab.deep_text import PRE, SETTINGS, SIZE, bits, room, trained
from normwise.lab.spec import Spec
from normwise.lab.verdict import UNBOUNDED, Effect

PERI = "charlm-peri-12-warm-up"
BOUNDED, BETTER = 1, 0.01


def specs(seeds: int) -> list[Spec]:
    return [*trained(PRE, seeds), *trained(PERI, seeds)]


def effects(evidence: Evidence) -> Sequence[Effect]:
    growth, needed = (
        [evidence.measure(task, "layer", SIZE, quantity) for task in (PRE, PERI)]
        for quantity in (last("residual/growth"), bits)
    )
    return [
        Effect(
            "residual variance, log2(last / first block): pre - peri",
            "doublings",
            BOUNDED,
            growth[0] - growth[1],
            headroom=UNBOUNDED,
        ),
        Effect(
            "held-out bits per character, pre - peri", "bits", BETTER, needed[0] - needed[1], headroom=room(*needed)
        ),
    ]


CLAIM = Claim(
    id="peri-ln",
    sentence="Norms before and after each sublayer bound the growth of the residual stream over the blocks and train "
    "better than norms before it alone.",
    source="Kim et al. 2025 (Peri-LN)",
    measured=f"x + norm(F(norm(x))) against x + F(norm(x)), both with a last norm, on text: {SETTINGS}. The variance "
    "that leaves the last block over that of the first, on held-out text after the last step; and held-out bits per "
    "character.",
    rule=f"With both norms the variance grows by at least {BOUNDED} doubling less, and the text needs at least "
    f"{BETTER:g} bits per character less.",
    specs=specs,
    effects=effects,
    against="The paper's own nets have 400M parameters and more; learned gains may undo the bound.",
)
