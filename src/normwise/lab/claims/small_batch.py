"""small-batch: what happens to each norm as the batch shrinks."""

from __future__ import annotations

import math
from collections.abc import Sequence

from normwise.lab.claim import WORST_LOSS, Claim, Evidence, accuracy, bounded_loss
from normwise.lab.spec import Spec, expand
from normwise.lab.verdict import Effect, per_halving

CASES = 4000
# Offered 0.1 as well, no norm took it at 8 and fewer: its training loss was higher for each of them.
RATES = {64: [0.01, 0.1], 8: [0.01], 4: [0.01], 2: [0.01]}
SIZES = tuple(RATES)
HALVINGS = math.log2(max(SIZES) / min(SIZES))
LOSS, ERROR = 0.02, 0.2
NORMS = {"batch": "BN", "layer": "LN", "group": "GN"}


def specs(seeds: int) -> list[Spec]:
    return [
        spec
        for size in SIZES
        for spec in expand(
            "mlp", seeds=seeds, norms=list(NORMS), batch_sizes=[size], learning_rates=RATES[size], steps=CASES // size
        )
    ]


def effects(evidence: Evidence) -> Sequence[Effect]:
    found = []
    for norm, short in NORMS.items():
        loss = per_halving({size: evidence.measure("mlp", norm, size, bounded_loss) for size in SIZES})
        right = per_halving({size: evidence.measure("mlp", norm, size, accuracy) for size in SIZES})
        error = (-100) * right
        # Up to what a loss counts as, and to the error of guessing, shared out over the halvings.
        losses, rights = (evidence.measure("mlp", norm, max(SIZES), quantity) for quantity in (bounded_loss, accuracy))
        for_loss = losses.each(lambda value: (WORST_LOSS - value) / HALVINGS)
        for_error = rights.each(lambda value: 100 * (value - 0.1) / HALVINGS)
        if norm == "batch":
            found += [
                Effect("BN: training loss grows a halving by", "nats", LOSS, loss, headroom=for_loss),
                Effect("BN: test error grows a halving by", "points", ERROR, error, headroom=for_error),
            ]
        else:
            found += [
                Effect(f"{short}: training loss falls a halving by", "nats", -LOSS, -loss, headroom=for_loss),
                Effect(f"{short}: test error falls a halving by", "points", -ERROR, -error, headroom=for_error),
            ]
    return found


CLAIM = Claim(
    id="small-batch",
    sentence="As the batch shrinks (64, 8, 4, 2) BatchNorm's training loss and test error grow; LayerNorm's and "
    "GroupNorm's do not.",
    source="Ba et al. 2016, section 6.6; Wu & He 2018",
    measured=f"On mlp, one epoch of {CASES:,} cases at every batch size (so small batches make more steps, as in Wu & "
    "He): by how much the training loss at the end and the held-out error grow each time the batch is halved, the "
    "least-squares slope over the four sizes.",
    rule=f"For BatchNorm at least {LOSS:g} nats and {ERROR:g} points a halving; for LayerNorm and GroupNorm no more "
    "than that.",
    specs=specs,
    effects=effects,
)
