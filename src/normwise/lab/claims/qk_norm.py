"""qk-norm: does a norm of queries and keys keep attention logits small and high learning rates usable?

A seed's runs take about 40 s on two cores (by the time of a step).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from normwise.lab.claim import Claim, Evidence
from normwise.lab.spec import Spec, expand
from normwise.lab.store import Run
from normwise.lab.verdict import UNBOUNDED, Effect, log2_ratio

WITHOUT, WITH = "charlm-pre-4-warm-up", "charlm-pre-4-warm-up-qk-norm"
SIZE, STEPS, RATES = 32, 200, [3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1]
STEADIER, SMALLER = 0.15, 2


def specs(seeds: int) -> list[Spec]:
    return [
        spec
        for task in (WITHOUT, WITH)
        for spec in expand(task, seeds=seeds, norms=["layer"], batch_sizes=[SIZE], learning_rates=RATES, steps=STEPS)
    ]


def sensitivity(runs: Sequence[Run]) -> float:
    """The mean over the rates of min(loss, initial loss), less the least of them, in bits (Wortsman et al. 2023). A run
    that diverged counts as the initial loss."""
    capped = []
    for run in runs:
        initial = run.series["heldout/eval/bits-per-character"].values[0]
        final = run.series["final/bits-per-character"].values[-1] if run.status == "done" else math.inf
        capped.append(min(final, initial) if math.isfinite(final) else initial)
    return sum(capped) / len(capped) - min(capped) if len(runs) == len(RATES) else math.nan


def largest_logit(run: Run) -> float:
    """Over all looks: a run that diverged has some too."""
    return max((v for v in run.series["attention/max-logit"].values if math.isfinite(v)), default=math.nan)


def effects(evidence: Evidence) -> Sequence[Effect]:
    without, with_norm = (evidence.over_rates(task, "layer", SIZE, sensitivity) for task in (WITHOUT, WITH))
    large, small = (evidence.measure(task, "layer", SIZE, largest_logit, rate=RATES[-1]) for task in (WITHOUT, WITH))
    return [
        Effect(
            "sensitivity to the learning rate, without - with", "bits", STEADIER, without - with_norm, headroom=without
        ),  # what there is to mend
        Effect(
            f"largest attention logit at rate {RATES[-1]:g}: log2(without / with)",
            "doublings",
            SMALLER,
            log2_ratio(large, small),
            headroom=UNBOUNDED,
        ),
    ]


CLAIM = Claim(
    id="qk-norm",
    sentence="Without a norm of queries and keys attention logits grow and high learning rates fail.",
    source="Henry et al. 2020; Dehghani et al. 2023; Wortsman et al. 2023",
    measured=f"On text, 4 pre-LN blocks of width 32, with and without a LayerNorm of queries and keys head by head, at "
    f"batch size {SIZE}, {STEPS} steps of Adam (0.9, 0.95) with gradients clipped to norm 1, 5% warm-up and a linear "
    "decay: the mean over seven learning rates from 0.0003 to 0.3 of min(final, initial) held-out bits per character, "
    "less the least of them; and the largest |q . k| / sqrt(d) on held-out text, over three looks, at rate 0.3.",
    rule=f"With the norm the sensitivity is at least {STEADIER:g} bits lower and the largest logit at least {SMALLER} "
    "doublings lower.",
    specs=specs,
    effects=effects,
    against="Wortsman et al. 2023 see the instability in small models at high rates alone: at the best rate the norm "
    "need not help.",
)
