"""bn-finetune: fine-tuning on few cases leaves BatchNorm's running statistics behind."""

from __future__ import annotations

from collections.abc import Sequence

import torch

import normwise
from normwise.lab.claim import Claim, Evidence, last
from normwise.lab.spec import Spec, expand
from normwise.lab.verdict import Check, Effect, lacks

SIZE, RATES, STEPS = 64, [0.01, 0.1], 300
COST = 2
FINE_STEPS, ROUNDING = 30, 1e-12
BETTER = {
    "recalibrated": "momentum 0.01 and statistics re-estimated on the same 50 cases",
    "fast": "momentum 0.1",
    "frozen": "frozen statistics",
}


def checks() -> Sequence[Check]:
    """A feature of mean 0 until now, and of mean 1 from now on: what is left of the 0 is 1 - running_mean."""
    x = torch.tensor([[0.0], [2.0]], dtype=torch.float64)
    found = []
    for momentum in (0.1, 0.01):
        norm = normwise.BatchNorm1d(1, momentum=momentum, dtype=x.dtype)
        for _ in range(FINE_STEPS):
            norm(x)
        assert norm.running_mean is not None
        left = 1 - float(norm.running_mean)
        what = f"momentum {momentum:g}, weight of the old statistics after {FINE_STEPS} steps less (1 - m)^n"
        found.append(Check(what, abs(left - (1 - momentum) ** FINE_STEPS), ROUNDING))
    return found


def specs(seeds: int) -> list[Spec]:
    return expand("bn-finetune", seeds=seeds, norms=["batch"], batch_sizes=[SIZE], learning_rates=RATES, steps=STEPS)


def effects(evidence: Evidence) -> Sequence[Effect]:
    found = []
    slow, *others = (
        100 * evidence.measure("bn-finetune", "batch", SIZE, last(f"final/{way}/accuracy")) for way in ("slow", *BETTER)
    )
    for words, other in zip(BETTER.values(), others, strict=True):
        room = lacks(100, other, slow, worst=10)
        found.append(Effect(f"accuracy, {words} - momentum 0.01", "points", COST, other - slow, headroom=room))
    return found


CLAIM = Claim(
    id="bn-finetune",
    sentence="Fine-tuned on a few small batches of other data, BatchNorm evaluates by statistics of the old: after n "
    "steps they still weigh (1 - m)^n. A larger momentum, frozen statistics or recalibration make up for it.",
    source="users' reports; Keras's guide to transfer learning",
    measured=f"That weight after {FINE_STEPS} steps, in float64. On bn-finetune, trained for {STEPS} steps at batch "
    f"size {SIZE} (at the rate of {', '.join(map(str, RATES))} that the training loss chooses) and then for "
    f"{FINE_STEPS} at batch size 8 on 50 digits of half the contrast on a lighter ground: accuracy on the held-out "
    "digits of that contrast, after momentum 0.1, 0.01, frozen statistics, and 0.01 with `recalibrate` on the 50.",
    rule=f"The weight to {ROUNDING:g}; recalibrated, momentum 0.1 and frozen each at least {COST} points above "
    "momentum 0.01.",
    against="Frozen statistics are the old ones with a weight of 1: that weights trained with them fit them is what "
    "has to make up for it.",
    checks=checks,
    specs=specs,
    effects=effects,
)
