"""What the claims that run on deep transformers on text (``tasks/charlm_deep.py``) share, so that they share runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import fmean

from normwise.lab.claim import Evidence, last
from normwise.lab.norms import DYT_ALPHAS
from normwise.lab.score import training_loss
from normwise.lab.spec import Spec, expand
from normwise.lab.store import Run
from normwise.lab.verdict import Measured, lacks

SIZE, STEPS = 32, 200
RATES = [0.001, 0.004, 0.016, 0.064]
PRE = "charlm-pre-12-warm-up"
SETTINGS = (
    f"12 causal blocks of width 16, pieces of 32 characters, batch size {SIZE}, {STEPS} steps of Adam, a warm-up of 20 "
    "steps and a linear decay to 0, each arm at that of the learning rates 0.001, 0.004, 0.016 and 0.064 that gave "
    "the lowest training loss"
)

bits = last("final/bits-per-character")
"""Bits per character on the held-out text after the last step."""

ENTROPY, UNLEARNED = 1.0, 4.69
"""Bits per character that a reader of English needs (Shannon 1951: 0.6 to 1.3), and that one needs who knows no more of
this text than how often each character occurs."""


def room(*arms: Measured) -> Measured:
    """What the best of the arms, in bits per character, still lacks of ``ENTROPY``, or is better than ``UNLEARNED``."""
    return lacks(ENTROPY, *arms, worst=UNLEARNED)


def trained(task: str, seeds: int, *norms: str) -> list[Spec]:
    """The runs of a variant with each of ``norms`` (LayerNorm by default) at each learning rate."""
    norms = norms or ("layer",)
    return expand(task, seeds=seeds, norms=norms, batch_sizes=[SIZE], learning_rates=RATES, steps=STEPS)


def of_best_dyt(evidence: Evidence, task: str, quantity: Callable[[Run], float]) -> Measured:
    """Of DyT with that of the alphas which gave the lowest training loss: as with rates, held-out text has no say."""

    def loss(norm: str) -> float:
        found = evidence.measure(task, norm, SIZE, training_loss).by_seed.values()
        return fmean(found) if found else math.inf

    return evidence.measure(task, min(DYT_ALPHAS, key=loss), SIZE, quantity)
