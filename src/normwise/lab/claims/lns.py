"""lns: do deep pre-LN blocks idle, and does scaling their norms wake them?

A seed's runs take about 40 s on two cores (by the time of a step); those of pre-LN are shared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from normwise.lab.claim import Claim, Evidence, last
from normwise.lab.deep_text import PRE, SETTINGS, SIZE, bits, room, trained
from normwise.lab.spec import Spec
from normwise.lab.store import Run
from normwise.lab.verdict import UNBOUNDED, Effect, log2_ratio

LNS = "charlm-lns-12-warm-up"
AWAKE, BETTER = 0.5, 0.01
NO_RISE = 0.001


def specs(seeds: int) -> list[Spec]:
    return [*trained(PRE, seeds), *trained(LNS, seeds)]


def rise(run: Run) -> float:
    """By how much the loss rises without a late block; a rise below ``NO_RISE`` nats, or a fall, counts as that."""
    found = last("skipped/late")(run)
    return found if math.isnan(found) else max(NO_RISE, found)


def effects(evidence: Evidence) -> Sequence[Effect]:
    rises, needed = (
        [evidence.measure(task, "layer", SIZE, quantity) for task in (PRE, LNS)] for quantity in (rise, bits)
    )
    return [
        Effect(
            "loss rise without a late block: log2(LNS / pre)",
            "doublings",
            AWAKE,
            log2_ratio(rises[1], rises[0]),
            headroom=UNBOUNDED,
        ),
        Effect("held-out bits per character, pre - LNS", "bits", BETTER, needed[0] - needed[1], headroom=room(*needed)),
    ]


CLAIM = Claim(
    id="lns",
    sentence="The deep blocks of a pre-LN transformer do little; norms scaled by 1 / sqrt(block) make them work.",
    source="Sun et al. 2025 (LayerNorm Scaling)",
    measured="x + F(norm(x) / sqrt(l)) in block l against x + F(norm(x)), both with a last norm that is not scaled, on "
    f"text: {SETTINGS}. The rise of the loss on held-out text where one block is skipped, mean over the last three "
    f"blocks, in turn, at least {NO_RISE:g} nats; and held-out bits per character.",
    rule=f"With the factor the rise is at least 2^{AWAKE:g} times as large, and the text needs at least {BETTER:g} "
    "bits per character less.",
    specs=specs,
    effects=effects,
    against="A small language model gained no more than 0.003 by it; the paper's smallest has 130M parameters.",
)
