"""dropout-bn: dropout before BatchNorm makes training's variances larger than evaluation's."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

import normwise
from normwise.lab.claim import Claim, Evidence, accuracy, last
from normwise.lab.spec import Spec, expand
from normwise.lab.verdict import Check, Effect, lacks
from normwise.measure.snapshot import random_state_kept

SIZE, RATES, STEPS = 64, [0.01, 0.1], 500
LOSS, BACK = 1.0, 0.5
DRAWS = 400_000
ERRORS = 5
# mean, variance, share kept
FEATURES = ((0.0, 1.0, 0.5), (1.0, 0.5, 0.5), (2.0, 1.0, 0.8))


def checks() -> Sequence[Check]:
    found = []
    with random_state_kept():
        torch.manual_seed(0)
        for mean, variance, kept in FEATURES:
            x = mean + math.sqrt(variance) * torch.randn(DRAWS, 1, dtype=torch.float64)
            dropped = nn.Dropout(1 - kept)(x)
            ratio = _variance(x) / _variance(dropped)
            formula = variance / ((mean**2 + variance) / kept - mean**2)
            off = abs(ratio / formula - 1) / math.hypot(_relative_error(x), _relative_error(dropped))
            what = f"mean {mean:g}, variance {variance:g}, {kept:g} kept: ratio of variances less formula"
            found.append(Check(f"{what}, in standard errors", off, ERRORS))
    return found


def _variance(x: torch.Tensor) -> float:
    """The running variance that a BatchNorm has of one batch."""
    norm = normwise.BatchNorm1d(1, momentum=1.0, dtype=x.dtype)
    norm(x)
    assert norm.running_var is not None
    return float(norm.running_var)


def _relative_error(x: torch.Tensor) -> float:
    """The standard error of a sample's variance over that variance: sqrt((fourth moment / variance^2 - 1) / n)."""
    centred = x - x.mean()
    return math.sqrt((float(centred.pow(4).mean() / centred.square().mean() ** 2) - 1) / len(x))


def specs(seeds: int) -> list[Spec]:
    return [
        spec
        for task in ("dropout-before-bn", "dropout-after-bn")
        for spec in expand(task, seeds=seeds, norms=["batch"], batch_sizes=[SIZE], learning_rates=RATES, steps=STEPS)
    ]


def effects(evidence: Evidence) -> Sequence[Effect]:
    before, after = (100 * evidence.measure(f"dropout-{at}-bn", "batch", SIZE, accuracy) for at in ("before", "after"))
    again = 100 * evidence.measure("dropout-before-bn", "batch", SIZE, last("final/recalibrated/accuracy"))
    what = "held-out accuracy, dropout behind all BN - before BN"
    return [
        Effect(what, "points", LOSS, after - before, headroom=lacks(100, after, before, worst=10)),
        Effect(
            "the same of dropout before BN: statistics without dropout - running ones",
            "points",
            BACK,
            again - before,
            headroom=lacks(100, again, before, worst=10),
        ),
    ]


CLAIM = Claim(
    id="dropout-bn",
    sentence="Dropout before BatchNorm makes a feature's variance in training larger than in evaluation, and accuracy "
    "pays for it; dropout behind all BatchNorms does not, and statistics re-estimated without dropout make up for much "
    "of it.",
    source="Li et al. 2019",
    measured=f"The ratio of a feature's two variances over {DRAWS:,} draws, beside v / ((c^2 + v) / p - c^2) for mean "
    f"c, variance v and a share p kept. On dropout-before-bn and dropout-after-bn at batch size {SIZE}, {STEPS} steps, "
    f"at the rate of {', '.join(map(str, RATES))} that the training loss chooses: held-out accuracy, and that of the "
    "former after `recalibrate` on the training cases.",
    rule=f"The ratio within {ERRORS} standard errors of the formula; dropout behind all BatchNorms at least {LOSS:g} "
    f"point above dropout before them, and recalibration at least {BACK:g}, half of that.",
    against="The net with dropout behind all norms has less of it (one layer of four), so it is regularized less as "
    "well: the first difference is not of variances alone, the second is.",
    checks=checks,
    specs=specs,
    effects=effects,
)
