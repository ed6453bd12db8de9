"""invariance: the 18 cells of Ba et al.'s Table 1."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

import normwise
from normwise.lab.claim import Claim
from normwise.lab.claims.bn_columns import TINY
from normwise.lab.verdict import Check

CASES, INPUTS, UNITS = 16, 9, 6
UNCHANGED, CHANGED = 1e-9, 1e-2

Change = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def weight_norm(w: Tensor, x: Tensor) -> Tensor:
    """Weight normalization (Salimans & Kingma 2016) with gain 1: every weight vector divided by its length."""
    y: Tensor = x @ (w / w.norm(dim=1, keepdim=True)).T
    return y


def batch_norm(w: Tensor, x: Tensor) -> Tensor:
    y: Tensor = normwise.BatchNorm1d(UNITS, eps=TINY, affine=False, dtype=x.dtype)(x @ w.T)
    return y


def layer_norm(w: Tensor, x: Tensor) -> Tensor:
    y: Tensor = normwise.LayerNorm(UNITS, eps=TINY, elementwise_affine=False, dtype=x.dtype)(x @ w.T)
    return y


METHODS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {"BN": batch_norm, "WN": weight_norm, "LN": layer_norm}


def first_row(t: Tensor, factor: float) -> Tensor:
    return torch.cat([factor * t[:1], t[1:]])


SHIFT = torch.linspace(-1, 2, INPUTS, dtype=torch.float64)
CHANGES: Mapping[str, Change] = {
    "weight matrix re-scaling": lambda w, x: (3 * w, x),
    "weight matrix re-centering": lambda w, x: (w + SHIFT, x),
    "single weight vector re-scaling": lambda w, x: (first_row(w, 3), x),
    "data set re-scaling": lambda w, x: (w, 3 * x),
    "data set re-centering": lambda w, x: (w, x + SHIFT),
    "single case re-scaling": lambda w, x: (w, first_row(x, 3)),
}

# Which of them leave the output as it is, in the order of CHANGES.
TABLE_1: Mapping[str, tuple[bool, ...]] = {
    "BN": (True, False, True, True, True, False),
    "WN": (True, False, True, False, False, False),
    "LN": (True, True, False, True, False, True),
}


def checks() -> Sequence[Check]:
    draws = torch.Generator().manual_seed(0)
    w = torch.randn(UNITS, INPUTS, dtype=torch.float64, generator=draws)
    x = torch.randn(CASES, INPUTS, dtype=torch.float64, generator=draws)
    return [
        Check(
            f"{method}, {name}: {'invariant, ' if invariant else 'not invariant, '}output moves by",
            float((METHODS[method](*change(w, x)) - METHODS[method](w, x)).abs().max()),
            UNCHANGED if invariant else CHANGED,
            at_most=invariant,
        )
        for method, row in TABLE_1.items()
        for (name, change), invariant in zip(CHANGES.items(), row, strict=True)
    ]


CLAIM = Claim(
    id="invariance",
    sentence="Which re-scalings and re-centerings of weights and data leave the layer's output as it is: the 18 "
    "cells of Table 1.",
    source="Ba et al. 2016, Table 1",
    measured="The largest change of any output of a linear layer with BatchNorm, weight normalization or LayerNorm "
    "(no gain, no bias, eps next to 0), in float64.",
    rule=f"Every cell: invariant moves it by at most {UNCHANGED:g}, not invariant by {CHANGED:g} or more.",
    checks=checks,
)
