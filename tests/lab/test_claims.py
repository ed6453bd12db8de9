"""Every claim's rule on three made-up stores: one that must support it, one that must contradict it, one in which the
seeds disagree and it must stay open. What a rule should see is written here by hand, number by number."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from normwise.lab.claim import judge
from normwise.lab.claims import chosen, claims
from normwise.lab.errors import LabError
from normwise.lab.spec import Spec
from normwise.lab.verdict import Check
from support import worlds_of_set_ups
from support.made_up_runs import Values, made_up

EXACT = ("bn-columns", "bn-count", "identity", "invariance", "padding", "scale-exact")

# For each claim: what a run records where the claim holds, and where it does not.
World = Callable[[Spec], Values]
ACCURACY, BITS = "final/accuracy", "final/bits-per-character"


def by_norm(name: str, **of_norms: float) -> World:
    return lambda spec: {name: [of_norms[spec.norm.replace("-", "_")]]}


def losses(**of_norms: float) -> World:
    return lambda spec: {"train/loss": [of_norms[spec.norm]] * spec.steps}


def sizes(values: Values, name: str, start: float, growth: float, norm: str = "batch") -> World:
    """``start`` at batch size 64 and ``growth`` more for each halving, for one norm; others stay at ``start``."""

    def of(spec: Spec) -> Values:
        halvings = 6 - spec.batch_size.bit_length() + 1 if spec.norm == norm else 0
        return {**values, name: [start + growth * halvings] * (spec.steps if name == "train/loss" else 1)}

    return of


def both(one: World, other: World) -> World:
    return lambda spec: {**one(spec), **other(spec)}


def fast(with_norm: str) -> World:
    """Nets with ``with_norm`` learn at once everywhere; the others only from a good start at a middle rate."""

    def of(spec: Spec) -> Values:
        good = spec.norm == with_norm or (spec.task == "mlp" and spec.learning_rate == 0.1)
        low = 0.2 if good else 2.3
        slope = 20 if spec.norm == with_norm else 120
        return {"train/loss": [2.3 if step < slope else low for step in range(spec.steps)]}

    return of


def flat(none: float, norm: float, reaches: float) -> World:
    def of(spec: Spec) -> Values:
        without = spec.norm == "none"
        first = 0.01 if without else reaches
        return {"saturated": [none if without else norm], "gradient/a": [first] * 3, "gradient/b": [1.0] * 3}

    return of


def bumpy(rough_batch: float, per_step: float) -> World:
    def of(spec: Spec) -> Values:
        bump = rough_batch if spec.norm.startswith("batch") else 0.1
        right = {"batch-per-step": per_step}.get(spec.norm, 0.9)
        return {"train/loss": [1 + bump * (-1) ** step for step in range(spec.steps)], "final/accuracy": [right]}

    return of


def longer(batch: float, layer: float) -> World:
    def of(spec: Spec) -> Values:
        lost = layer if spec.norm == "layer" else batch
        return {"final/longer/accuracy": [0.9 - lost], "final/longer-cut/accuracy": [0.9]}

    return of


def drifting(none: float, layer: float) -> World:
    def of(spec: Spec) -> Values:
        growth = none if spec.norm == "none" else layer
        sizes = [2 ** (growth * step / 15) for step in range(16)] + [9.0] * 8
        return {"train/longest": [16.0], **{f"over-time/summed/{mode}/end": sizes for mode in ("train", "eval")}}

    return of


def shifts(batch: float) -> World:
    return lambda spec: {f"shift/{k}/x": [batch if spec.norm == "batch" else 1.0] for k in ("gradient", "inputs")}


def plain(accuracy: float) -> World:
    bits = by_norm(BITS, layer=2.5, layer_plain=2.5 + (0.9 - accuracy))
    right = by_norm(ACCURACY, layer=0.9, layer_plain=accuracy)
    return lambda spec: (bits if spec.task.startswith("charlm") else right)(spec)


def text(values: Callable[[Spec], Values], **of_arms: float) -> World:
    """Bits per character by placement, or by norm where all arms are of one placement; 3 for those not named."""

    def of(spec: Spec) -> Values:
        arm = spec.norm if spec.norm != "layer" else spec.task.removeprefix("charlm-")
        found = [of_arms[name] for name in of_arms if arm.replace("-", "_").startswith(name)]
        return {BITS: [found[-1] if found else 3.0], **values(spec)}

    return of


def recorded(spec: Spec) -> Values:
    return {}


def placed(name: str, **of_placements: float) -> Callable[[Spec], Values]:
    return lambda spec: {name: [of_placements[spec.task.split("-")[1]]]}


def sensitive(without: float, with_norm: float, logit: float) -> World:
    """Both need 3 bits at the lowest rate and so much more on average over the seven. Learning nothing is 6.7."""

    def of(spec: Spec) -> Values:
        has_norm = spec.task.endswith("qk-norm")
        more = 7 / 6 * (with_norm if has_norm else without) if spec.learning_rate > 3e-4 else 0
        logits = [1.0, 8.0 if has_norm else logit, 2.0]
        return {"heldout/eval/bits-per-character": [6.7, 3.0], BITS: [3 + more], "attention/max-logit": logits}

    return of


def first_gradients(growth: float) -> Callable[[Spec], Values]:
    """Post-LN's last gradient over pre-LN's, ``growth`` doublings more at 16 blocks than at 2."""

    def of(spec: Spec) -> Values:
        _, placement, blocks, *_ = spec.task.split("-")
        large = 2 ** (1 + growth) if (placement, blocks) == ("post", "16") else 2.0
        return {
            f"gradient/blocks.{int(blocks) - 1}.1.function.down.weight": [large if placement == "post" else 1.0, 1.0]
        }

    return of


GROWS = both(sizes({}, "train/loss", 0.5, 0.1), sizes({}, ACCURACY, 0.9, -0.02))
WORLDS: dict[str, tuple[World, World]] = {
    **worlds_of_set_ups.WORLDS,
    "batch-of-one": (by_norm(ACCURACY, layer=0.8), by_norm(ACCURACY, layer=0.12)),
    "cnn": (
        by_norm(ACCURACY, none=0.9, layer=0.92, batch=0.95),
        by_norm(ACCURACY, none=0.9, layer=0.95, batch=0.92),
    ),
    "deepnorm": (text(recorded, post=4.0), text(recorded, post=3.0)),
    "derf": (text(recorded, derf=2.9), text(recorded, derf=3.1)),
    "dyt": (text(recorded), text(recorded, dyt=3.2)),
    "faster": (fast("batch"), fast("none")),
    "ics": (shifts(1.2), shifts(0.3)),
    "lns": (
        text(placed("skipped/late", pre=0.01, lns=0.04), lns=2.9),
        text(placed("skipped/late", pre=0.01, lns=0.01), lns=3.0),
    ),
    "longer": (longer(batch=0.1, layer=0.0), longer(batch=0.1, layer=0.1)),
    "no-affine": (plain(0.9), plain(0.8)),
    "peri-ln": (
        text(placed("residual/growth", pre=4.0, peri=1.0), peri=2.9),
        text(placed("residual/growth", pre=2.0, peri=2.0), peri=2.9),
    ),
    "post-ln": (
        text(first_gradients(1.5), post_12=3.3, post_12_warm_up=3.0),
        text(first_gradients(0), post_12=3.0, post_12_warm_up=3.0),
    ),
    "qk-norm": (sensitive(1.0, 0.2, 100.0), sensitive(1.0, 1.0, 8.0)),
    "rmsnorm": (text(recorded), text(recorded, rms=3.2)),
    "rnn": (bumpy(0.5, 0.95), bumpy(0.1, 0.95)),
    "saturation": (flat(0.3, 0.0, 0.1), flat(0.3, 0.299, 0.1)),
    "small-batch": (GROWS, both(sizes({}, "train/loss", 0.5, 0.1, "layer"), sizes({}, ACCURACY, 0.9, -0.02, "layer"))),
    "steady-sums": (drifting(1.0, 0.0), drifting(1.0, 1.0)),
    "time-average": (
        by_norm("final/longer-cut/loss", batch_per_step=0.5, batch_time_average=0.9),
        by_norm("final/longer-cut/loss", batch_per_step=0.5, batch_time_average=0.5),
    ),
    "train-eval-gap": (sizes({}, "heldout/gap", 0.05, 0.05), sizes({}, "heldout/gap", 0.05, 0.0)),
    "transformer": (
        by_norm(BITS, batch=2.6, batch_masked=2.5, layer=2.4),
        by_norm(BITS, batch=2.4, batch_masked=2.5, layer=2.4),
    ),
}


def with_noise(world: World, size: float) -> Callable[[Spec, random.Random], Values]:
    def of(spec: Spec, draws: random.Random) -> Values:
        factor = 1 + size * draws.gauss(0, 1)
        return {name: [value * factor for value in values] for name, values in world(spec).items()}

    return of


def mixed(holds: World, fails: World) -> Callable[[Spec, random.Random], Values]:
    """The claim holds in the runs of even seeds and fails in those of odd ones."""
    return lambda spec, _: (holds if spec.seed % 2 == 0 else fails)(spec)


def test_every_claim_that_needs_runs_has_its_worlds():
    assert sorted(name for name, claim in claims().items() if claim.effects) == sorted(WORLDS)


@pytest.mark.parametrize("name", WORLDS)
def test_a_rule_supports_contradicts_and_leaves_open(name):
    claim = claims()[name]
    holds, fails = WORLDS[name]
    verdicts = [
        judge(claim, made_up(claim, 6, world), 6).verdict
        for world in (with_noise(holds, 0.001), with_noise(fails, 0.001), mixed(holds, fails))
    ]
    assert verdicts == ["supported", "contradicted", "undecided"]


@pytest.mark.parametrize("name", WORLDS)
def test_two_seeds_leave_it_open_and_say_what_would_decide(name):
    claim = claims()[name]
    judged = judge(claim, made_up(claim, 2, with_noise(WORLDS[name][0], 0.001)), 2)
    effects = [part for part in judged.parts if not isinstance(part, Check)]
    assert judged.verdict == "undecided"
    assert {part.would_decide.partition(";")[0] for part in effects} == {"2 of the 3 seeds that a verdict needs"}


@pytest.mark.parametrize("name", WORLDS)
def test_no_runs_leave_it_open(name):
    judged = judge(claims()[name], (), 5)
    assert (judged.verdict, judged.found, judged.runs) == ("undecided", 0, ())
    assert judged.wanted > 0


@pytest.mark.parametrize("name", WORLDS)
def test_the_runs_behind_a_verdict_are_the_claim_s_own(name):
    claim = claims()[name]
    runs = made_up(claim, 3, with_noise(WORLDS[name][0], 0.001))
    other = made_up(claims()["cnn" if name != "cnn" else "rnn"], 1, lambda spec, draws: {})
    judged = judge(claim, [*other, *runs], 3)
    assert judged.runs
    assert set(judged.runs) <= {run.key for run in runs}


@pytest.mark.parametrize("name", EXACT)
def test_exact_claims_hold_to_rounding(name):
    judged = judge(claims()[name], (), 1)
    assert {part.what: part.verdict for part in judged.parts if part.verdict != "supported"} == {}
    assert (judged.claim.kind, judged.wanted) == ("exact", 0)


def test_every_claim_is_tested_and_says_what_it_needs_to():
    assert sorted(claims()) == sorted({*WORLDS, *EXACT})
    assert len(judge(claims()["invariance"], (), 1).parts) == 18
    for name, claim in claims().items():
        assert claim.id == name
        assert all(text.endswith(".") for text in (claim.sentence, claim.measured, claim.rule))
        assert claim.source
        assert claim.kind in ("exact", "run", "exact + run")


def test_an_unknown_claim_is_named_with_the_nearest():
    with pytest.raises(LabError, match=r"unknown claim 'ice'; did you mean ics\? \(known: batch-of-one, "):
        chosen(["cnn", "ice"])
    assert [claim.id for claim in chosen(["transformer", "identity"])] == ["identity", "transformer"]
