"""identity: what gain and bias can undo."""

from __future__ import annotations

from collections.abc import Sequence

import torch

import normwise
from normwise.lab.claim import Claim
from normwise.lab.claims.bn_columns import ROUNDING, TINY, standardized
from normwise.lab.verdict import Check


def checks() -> Sequence[Check]:
    x = 5 + 3 * torch.randn(64, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    norm = normwise.BatchNorm1d(10, dtype=x.dtype)
    plain = normwise.BatchNorm1d(10, eps=TINY, dtype=x.dtype)(x).detach()
    var, mean = torch.var_mean(x, dim=0, correction=0)
    with torch.no_grad():
        norm.weight.copy_((var + norm.eps).sqrt())
        norm.bias.copy_(mean)
    back = norm(x).detach()
    return [
        Check("gain 1, bias 0: off mean 0 and variance 1 by", standardized(plain, 0), ROUNDING),
        Check("gain sigma, bias mu: output off the input by", float((back - x).abs().max()), ROUNDING),
    ]


CLAIM = Claim(
    id="identity",
    sentence="Gain 1 and bias 0 only standardize; gain = sigma and bias = mu give the input back.",
    source="Ioffe & Szegedy 2015, section 3",
    measured="BatchNorm's output for 64 samples with 10 features in float64, with both pairs of gain and bias; sigma "
    "is sqrt(variance + eps).",
    rule=f"Off by at most {ROUNDING:g}.",
    checks=checks,
)
