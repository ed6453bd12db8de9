"""large-lr: BatchNorm's gain is the learning rate that it allows."""

from __future__ import annotations

from collections.abc import Sequence

from normwise.lab.claim import Claim, Evidence, accuracy
from normwise.lab.score import training_loss
from normwise.lab.spec import Spec, expand
from normwise.lab.store import Run
from normwise.lab.verdict import Effect, Measured, lacks, log2_ratio

SIZE, STEPS = 64, 400
RATES = [0.00125 * 2**k for k in range(11)]
TRAINED = 1.0
HIGHER, GAIN, SHARE = 2, 1.0, 0.25


def specs(seeds: int) -> list[Spec]:
    return expand(
        "deep-mlp", seeds=seeds, norms=["none", "batch"], batch_sizes=[SIZE], learning_rates=RATES, steps=STEPS
    )


def largest_rate(runs: Sequence[Run]) -> float:
    """The highest rate at which the training loss ends below TRAINED nats; half the lowest if it does at none."""
    trained = [float(run.identity["learning_rate"]) for run in runs if training_loss(run) < TRAINED]
    return max(trained, default=RATES[0] / 2)


def effects(evidence: Evidence) -> Sequence[Effect]:
    none_rate, batch_rate = (evidence.over_rates("deep-mlp", n, SIZE, largest_rate) for n in ("none", "batch"))
    # The grid ends: a net with BN cannot show a higher rate than its last one.
    above = log2_ratio(none_rate.each(lambda _: RATES[-1]), none_rate)
    none, batch = (100 * evidence.measure("deep-mlp", n, SIZE, accuracy) for n in ("none", "batch"))
    rate = evidence.chosen_rate("deep-mlp", "none", SIZE)
    slow = Measured({})
    if rate is not None:
        slow = 100 * evidence.measure("deep-mlp", "batch", SIZE, accuracy, rate=rate)
    gain, at_same = batch - none, slow - none
    room = lacks(100, batch, none, worst=10)
    return [
        Effect(
            "largest rate that trains: log2(BN / none)",
            "doublings",
            HIGHER,
            log2_ratio(batch_rate, none_rate),
            headroom=above,
        ),
        Effect("held-out accuracy, each at its own best rate: BN - none", "points", GAIN, gain, headroom=room),
        Effect(
            f"{SHARE:g} of that gain - the gain at the best rate of the net without norm",
            "points",
            -SHARE * GAIN,
            SHARE * gain - at_same,
            headroom=room,
        ),
    ]


CLAIM = Claim(
    id="large-lr",
    sentence="What BatchNorm gains is the learning rate that it allows: it trains at far larger ones, and at the best "
    "rate of the net without norm little of its gain is left.",
    source="Bjorck et al. 2018, sections 2 and 3",
    measured=f"On deep-mlp at batch size {SIZE}, {STEPS} steps, rates from {RATES[0]:g} to {RATES[-1]:g} by doublings: "
    f"the largest at which the training loss ends below {TRAINED:g} nat; held-out accuracy above that without norm, "
    "each at the rate that its training loss chooses, and BatchNorm at that of the net without.",
    rule=f"At least {HIGHER} doublings more; a gain of at least {GAIN:g} point; and of it at most a quarter at the "
    f"same rate, or {SHARE * GAIN:g} points more than that, a quarter of the smallest gain.",
    against="Santurkar et al. 2018 find a smoother loss at equal rates, and `faster` counts fewer steps at rates that "
    "both can take.",
    specs=specs,
    effects=effects,
)
