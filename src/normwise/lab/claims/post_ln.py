"""post-ln: does post-LN need a warm-up, and pre-LN none?

A seed's runs take about 90 s on two cores (by the time of a step); those of pre-LN with a warm-up are shared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from normwise.lab.claim import Claim, Evidence
from normwise.lab.deep_text import SIZE, UNLEARNED, bits, trained
from normwise.lab.spec import Spec, expand
from normwise.lab.store import Run
from normwise.lab.verdict import UNBOUNDED, Effect, log2_ratio

SHALLOW, DEEP = 2, 16
GROWS, NEEDED = 1, 0.05
WARM, COLD = "charlm-{}-12-warm-up", "charlm-{}-12"


def specs(seeds: int) -> list[Spec]:
    found = [spec for place in ("pre", "post") for task in (WARM, COLD) for spec in trained(task.format(place), seeds)]
    for place in ("pre", "post"):
        for blocks in (SHALLOW, DEEP):
            task = f"charlm-{place}-{blocks}"
            found += expand(task, seeds=seeds, norms=["layer"], batch_sizes=[SIZE], learning_rates=[0.001], steps=1)
    return found


def last_gradient(blocks: int) -> Callable[[Run], float]:
    """The norm of the gradient of the last weight of the last block, at the first batch, before any update."""
    return lambda run: run.series[f"gradient/blocks.{blocks - 1}.1.function.down.weight"].values[0]


def effects(evidence: Evidence) -> Sequence[Effect]:
    ratio = {
        blocks: log2_ratio(
            *(
                evidence.measure(f"charlm-{place}-{blocks}", "layer", SIZE, last_gradient(blocks), rate=0.001)
                for place in ("post", "pre")
            )
        )
        for blocks in (SHALLOW, DEEP)
    }
    lost = {
        place: evidence.measure(COLD.format(place), "layer", SIZE, bits)
        - evidence.measure(WARM.format(place), "layer", SIZE, bits)
        for place in ("pre", "post")
    }
    return [
        Effect(
            f"last block's gradient at the start, log2(post / pre): {DEEP} - {SHALLOW} blocks",
            "doublings",
            GROWS,
            ratio[DEEP] - ratio[SHALLOW],
            headroom=UNBOUNDED,
        ),
        Effect(
            "bits lost without warm-up, post - pre",
            "bits",
            NEEDED,
            lost["post"] - lost["pre"],
            headroom=evidence.measure(WARM.format("post"), "layer", SIZE, bits).each(lambda value: UNLEARNED - value),
        ),
    ]


CLAIM = Claim(
    id="post-ln",
    sentence="A transformer with its LayerNorms behind the residual sums needs a warm-up of the learning rate, for its "
    "last blocks' gradients are large at the start; with norms first it needs none.",
    source="Xiong et al. 2020",
    measured=f"On text, blocks of width 16, batch size {SIZE}. The gradient's norm of the last feed-forward weight at "
    f"the first batch, post-LN over pre-LN, in {DEEP} blocks against {SHALLOW}. And held-out bits per character of 12 "
    "blocks after 200 steps of Adam (0.9, 0.95) with linear decay, without warm-up less with one of 20 steps, each at "
    "that of the learning rates 0.001, 0.004, 0.016 and 0.064 that gave the lowest training loss.",
    rule=f"From {SHALLOW} to {DEEP} blocks the ratio post / pre grows by at least {GROWS} doubling, and post-LN loses "
    f"at least {NEEDED:g} bits more than pre-LN without warm-up.",
    specs=specs,
    effects=effects,
    against="Takase et al. 2022 (2206.00330): at 6 blocks post-LN trains and ends better than pre-LN; what fails in "
    "deep post-LN are vanishing gradients, which no warm-up mends.",
)
