"""train-eval-gap: how well running statistics stand for a batch's own."""

from __future__ import annotations

import math
from collections.abc import Sequence

from normwise.lab.claim import Claim, Evidence, last
from normwise.lab.claims.small_batch import CASES, RATES, SIZES
from normwise.lab.spec import Spec, expand
from normwise.lab.verdict import Effect, per_halving

CNN_SIZES, CNN_STEPS, CNN_RATES = (64, 8, 2), 150, [0.005, 0.03]
MINIMUM = 0.01


def specs(seeds: int) -> list[Spec]:
    mlp = [
        spec
        for size in SIZES
        for spec in expand(
            "mlp", seeds=seeds, norms=["batch"], batch_sizes=[size], learning_rates=RATES[size], steps=CASES // size
        )
    ]
    cnn = expand("cnn", seeds=seeds, norms=["batch"], batch_sizes=CNN_SIZES, learning_rates=CNN_RATES, steps=CNN_STEPS)
    return mlp + cnn


def effects(evidence: Evidence) -> Sequence[Effect]:
    gap = last("heldout/gap")
    found = []
    for task, sizes in (("mlp", SIZES), ("cnn", CNN_SIZES)):
        gaps = {size: evidence.measure(task, "batch", size, gap) for size in sizes}
        halvings = math.log2(max(sizes) / min(sizes))
        room = (1 / halvings) * gaps[max(sizes)].each(lambda value: 1 - value)
        found.append(Effect(f"{task}: gap grows a halving by", "of 1", MINIMUM, per_halving(gaps), headroom=room))
    return found


CLAIM = Claim(
    id="train-eval-gap",
    sentence="BatchNorm's running statistics fit less well at small batches: the gap between train-mode and "
    "eval-mode outputs grows.",
    source="users' reports",
    measured="Total variation (0 to 1) between the class probabilities of both modes on the same held-out cases "
    f"after training, and by how much it grows each time the batch is halved: mlp at {', '.join(map(str, SIZES))}, "
    f"cnn at {', '.join(map(str, CNN_SIZES))}.",
    rule=f"At least {MINIMUM:g} a halving, in both nets.",
    specs=specs,
    effects=effects,
)
