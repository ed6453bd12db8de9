"""batch-of-one: what is left of a batch of one."""

from __future__ import annotations

from collections.abc import Sequence

import torch

import normwise
from normwise.lab.claim import Claim, Evidence, accuracy
from normwise.lab.spec import Spec, expand
from normwise.lab.verdict import Check, Effect

STEPS, MINIMUM, CHANCE = 4000, 50, 0.1  # an epoch


def checks() -> Sequence[Check]:
    x = torch.randn(1, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    try:
        normwise.BatchNorm1d(12, dtype=x.dtype)(x)
        defined = 1
    except ValueError:
        defined = 0
    y = normwise.LayerNorm(12, dtype=x.dtype)(x)
    return [
        Check("BatchNorm in training: outputs for a batch of one (it raises)", defined, 0),
        Check("LayerNorm: outputs of a batch of one that are not finite", int((~y.isfinite()).sum()), 0),
    ]


def specs(seeds: int) -> list[Spec]:
    return expand("mlp", seeds=seeds, norms=["layer"], batch_sizes=[1], learning_rates=[0.01], steps=STEPS)


def effects(evidence: Evidence) -> Sequence[Effect]:
    found = evidence.measure("mlp", "layer", 1, accuracy).each(lambda share: 100 * (share - CHANCE))
    level = f"the level of one arm, 0 to {100 * (1 - CHANCE):g} points, which no other keeps from showing"
    what = "LayerNorm, one case at a time: held-out accuracy above chance"
    return [Effect(what, "points", MINIMUM, found, headroom=level)]


CLAIM = Claim(
    id="batch-of-one",
    sentence="BatchNorm over (N, C) is undefined at batch size 1 in training; LayerNorm is not: online learning works.",
    source="Ba et al. 2016",
    measured=f"Both layers on one sample; and the held-out accuracy of mlp with LayerNorm after {STEPS} cases, one at "
    "a time.",
    rule=f"BatchNorm raises, LayerNorm gives finite numbers, and the accuracy is at least {MINIMUM} points above the "
    "10 of guessing.",
    checks=checks,
    specs=specs,
    effects=effects,
)
