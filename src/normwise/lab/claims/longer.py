"""longer: sequences longer than any in training."""

from __future__ import annotations

from collections.abc import Sequence

from normwise.lab.claim import Claim, Evidence, last
from normwise.lab.claims.rnn import RATES, SIZE, STEPS
from normwise.lab.spec import Spec, expand
from normwise.lab.verdict import Effect, Measured

MINIMUM = 1
CHANCE = 100 / 9
CUT, WHOLE = (last(f"final/{part}/accuracy") for part in ("longer-cut", "longer"))


def specs(seeds: int) -> list[Spec]:
    norms = ["layer", "batch-per-step"]
    return [
        spec
        for task, steps in STEPS.items()
        for spec in expand(task, seeds=seeds, norms=norms, batch_sizes=[SIZE], learning_rates=RATES[task], steps=steps)
    ]


def cost(evidence: Evidence, task: str, norm: str) -> Measured:
    """What the extra steps take from the accuracy, in points."""
    cut, whole = (evidence.measure(task, norm, SIZE, quantity) for quantity in (CUT, WHOLE))
    return 100 * (cut - whole)


def effects(evidence: Evidence) -> Sequence[Effect]:
    found = []
    for task in STEPS:
        batch, layer = cost(evidence, task, "batch-per-step"), cost(evidence, task, "layer")
        # What can be lost is what is known before: the accuracy without the extra steps, above guessing.
        known = {
            norm: (100 * evidence.measure(task, norm, SIZE, CUT)).each(lambda right: right - CHANCE)
            for norm in ("layer", "batch-per-step")
        }
        what = f"{task}, accuracy lost by extra steps: BN - LN"
        found.append(Effect(what, "points", MINIMUM, batch - layer, headroom=known["batch-per-step"]))
        what = f"{task}, accuracy that extra steps give LN"
        found.append(Effect(what, "points", -MINIMUM, -layer, headroom=known["layer"]))
    return found


CLAIM = Claim(
    id="longer",
    sentence="On sequences longer than any seen in training BatchNorm has no statistics for the extra steps; "
    "LayerNorm needs none.",
    source="tutorials; Ba et al. 2016",
    measured=f"On rnn and lstm at batch size {SIZE}: held-out accuracy on the 125 utterances longer than the 16 steps "
    "of training, cut to 16, less that on the whole ones. Later steps than in training use the last step's "
    "statistics.",
    rule=f"The extra steps cost BatchNorm at least {MINIMUM} point more than LayerNorm, and LayerNorm no more than "
    f"{MINIMUM} point, in both nets.",
    specs=specs,
    effects=effects,
)
