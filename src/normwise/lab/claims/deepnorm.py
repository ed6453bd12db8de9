"""deepnorm: does scaling the residual and the initial weights keep deep post-LN trainable?

A seed's runs take about 75 s on two cores (by the time of a step).
"""

from __future__ import annotations

from collections.abc import Sequence

from normwise.lab.claim import Claim, Evidence
from normwise.lab.deep_text import RATES, bits, room
from normwise.lab.spec import Spec, expand
from normwise.lab.verdict import Effect

SIZE, STEPS = 16, 120
SHALLOW, DEEP = 4, 48
BETTER, LOST = 0.3, 0.1


def specs(seeds: int) -> list[Spec]:
    return [
        spec
        for task in (f"charlm-post-{DEEP}", f"charlm-deepnorm-{DEEP}", f"charlm-deepnorm-{SHALLOW}")
        for spec in expand(task, seeds=seeds, norms=["layer"], batch_sizes=[SIZE], learning_rates=RATES, steps=STEPS)
    ]


def effects(evidence: Evidence) -> Sequence[Effect]:
    post, deep, shallow = (
        evidence.measure(task, "layer", SIZE, bits)
        for task in (f"charlm-post-{DEEP}", f"charlm-deepnorm-{DEEP}", f"charlm-deepnorm-{SHALLOW}")
    )
    return [
        Effect(
            f"held-out bits per character at {DEEP} blocks, post - DeepNorm",
            "bits",
            BETTER,
            post - deep,
            headroom=room(post, deep),
        ),
        Effect(
            f"held-out bits per character of DeepNorm, {SHALLOW} - {DEEP} blocks",
            "bits",
            -LOST,
            shallow - deep,
            headroom=room(shallow),
        ),
    ]


CLAIM = Claim(
    id="deepnorm",
    sentence="DeepNorm, which scales the residual up and some initial weights down, keeps post-LN transformers "
    "trainable at depths at which they otherwise fail.",
    source="Wang et al. 2022 (DeepNet)",
    measured="norm(alpha x + F(x)) with alpha = (2N)^(1/4), and the initial weights of feed-forward, values and output "
    f"times (8N)^(-1/4), against norm(x + F(x)), on text: {DEEP} blocks of width 16, and {SHALLOW} with DeepNorm, "
    f"batch size {SIZE}, {STEPS} steps of Adam (0.9, 0.95) with a linear decay and no warm-up, each at that of the "
    "learning rates 0.001, 0.004, 0.016 and 0.064 that gave the lowest training loss. Held-out bits per character.",
    rule=f"At {DEEP} blocks post-LN needs at least {BETTER:g} bits per character more than DeepNorm (0.2 nats), and "
    f"DeepNorm at {DEEP} blocks at most {LOST:g} more than at {SHALLOW}.",
    specs=specs,
    effects=effects,
    against="Warm-up and a lower rate train post-LN of moderate depth as well (Xiong et al. 2020).",
)
