"""bn-columns: over which axis each norm standardizes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import normwise
from normwise.lab.claim import Claim
from normwise.lab.verdict import Check

ROUNDING, TINY = 1e-12, 1e-30


def standardized(y: Tensor, axis: int) -> float:
    """The largest distance of any mean along ``axis`` from 0, and of any (biased) variance from 1."""
    var, mean = torch.var_mean(y, dim=axis, correction=0)
    return float(torch.maximum(mean.abs().max(), (var - 1).abs().max()))


def checks() -> Sequence[Check]:
    x = 5 + 3 * torch.randn(64, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    batch = normwise.BatchNorm1d(10, eps=TINY, dtype=x.dtype)(x).detach()
    layer = normwise.LayerNorm(10, eps=TINY, dtype=x.dtype)(x).detach()
    return [
        Check("BatchNorm: columns off mean 0 and variance 1 by", standardized(batch, 0), ROUNDING),
        Check("BatchNorm: rows off them by", standardized(batch, 1), 0.1, at_most=False),
        Check("LayerNorm: rows off mean 0 and variance 1 by", standardized(layer, 1), ROUNDING),
        Check("LayerNorm: columns off them by", standardized(layer, 0), 0.1, at_most=False),
    ]


CLAIM = Claim(
    id="bn-columns",
    sentence="BatchNorm standardizes each feature over the batch; LayerNorm each sample over its features.",
    source="Ioffe & Szegedy 2015; Ba et al. 2016",
    measured="Means and variances of both layers' outputs down the columns and along the rows of a table of 64 "
    "samples with 10 features, in float64, eps next to 0.",
    rule=f"The layer's own axis is off mean 0 and variance 1 by at most {ROUNDING:g}, the other axis by 0.1 or more.",
    checks=checks,
)
