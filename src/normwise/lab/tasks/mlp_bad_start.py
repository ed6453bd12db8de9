"""Digits with the net of ``mlp``, from weights so large that its sigmoids start in their flat part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from normwise.lab.tasks.mlp import Mlp


@dataclass(frozen=True)
class MlpBadStart(Mlp):
    """``mlp`` with weights from N(0, 1): ten times the deviation at which 100 inputs keep a unit variance."""

    name: ClassVar[str] = "mlp-bad-start"
    summary: ClassVar[str] = "the net, data and optimiser of mlp, from weights of standard deviation 1 instead of 0.1"

    weight_std: float = 1.0
