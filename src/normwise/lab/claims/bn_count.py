"""bn-count: how many means and variances there are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import normwise
from normwise.lab.claim import Claim
from normwise.lab.claims.bn_columns import TINY
from normwise.lab.verdict import Check

SAMPLES, FEATURES = 7, 12


def statistics(x: Tensor, y: Tensor, axis: int) -> int:
    """How many different (mean, deviation) the lines of ``x`` along ``axis`` were standardized with to give ``y``.

    Each line's pair is found from its two farthest points; a line that one pair does not explain counts none.
    """
    lines_x, lines_y = (t.movedim(axis, -1).reshape(-1, t.shape[axis]) for t in (x, y))
    low, high = lines_x.argmin(1, keepdim=True), lines_x.argmax(1, keepdim=True)
    rise = lines_y.gather(1, high) - lines_y.gather(1, low)
    sigma = (lines_x.gather(1, high) - lines_x.gather(1, low)) / rise
    mean = lines_x.gather(1, low) - sigma * lines_y.gather(1, low)
    explained = ((lines_x - mean) / sigma - lines_y).abs().amax(1) < 1e-9
    pairs = torch.cat([mean, sigma], 1)[explained]
    return len({(round(m, 9), round(s, 9)) for m, s in pairs.tolist()})


def checks() -> Sequence[Check]:
    x = torch.randn(SAMPLES, FEATURES, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    batch = normwise.BatchNorm1d(FEATURES, eps=TINY, dtype=x.dtype)(x).detach()
    layer = normwise.LayerNorm(FEATURES, eps=TINY, dtype=x.dtype)(x).detach()
    return [
        Check(
            f"BatchNorm: pairs beyond or short of {FEATURES}, one a feature", abs(statistics(x, batch, 0) - FEATURES), 0
        ),
        Check("BatchNorm: samples that one pair explains", statistics(x, batch, 1), 0),
        Check(
            f"LayerNorm: pairs beyond or short of {SAMPLES}, one a sample", abs(statistics(x, layer, 1) - SAMPLES), 0
        ),
        Check("LayerNorm: features that one pair explains", statistics(x, layer, 0), 0),
    ]


CLAIM = Claim(
    id="bn-count",
    sentence="BatchNorm has as many means and variances as there are features, LayerNorm as many as there are samples.",
    source="tutorials on both",
    measured="The pairs (mean, deviation) that explain both layers' outputs, found from inputs and outputs alone, on "
    f"{SAMPLES} samples with {FEATURES} features in float64.",
    rule="As many different pairs as the claim says, and no line along the other axis that one pair explains.",
    checks=checks,
)
