"""Adding seeds: which claim comes first, when it stops, and that looking five times errs no more often than it says."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest

from normwise.lab.claim import Claim, accuracy
from normwise.lab.cost import Costs
from normwise.lab.decide import LOOK_CONFIDENCE, LOOKS, decide, fitting, seeds_needed, state
from normwise.lab.spec import Spec
from normwise.lab.store import Curve, Run
from normwise.lab.verdict import Effect, Measured


def claim(name: str, rate: float, steps: int = 20, headroom: Measured | str = "no ceiling") -> Claim:
    """One run a seed at a learning rate of its own, whose accuracy is to be 1 or more."""

    def effects(evidence):
        found = evidence.measure("mlp", "layer", 64, accuracy, rate=rate)
        return [Effect("accuracy", "points", 1.0, found, headroom=headroom)]

    def specs(seeds):
        return [Spec("mlp", "layer", 64, rate, seed, steps) for seed in range(seeds)]

    return Claim(name, "A.", "b", "C.", "D.", specs=specs, effects=effects)


class Lab:
    """Trains at once: what a run's accuracy is says ``value``, by learning rate and seed; a step takes a second."""

    def __init__(self, value: Callable[[float, int], float], seconds: float = 1e9) -> None:
        self.value, self.left = value, seconds
        self.runs: dict[str, Run] = {}
        self.order: list[tuple[float, int]] = []

    def train(self, specs):
        self.order.append((specs[0].learning_rate, len(specs)))
        for spec in specs:
            values = {"final/accuracy": [self.value(spec.learning_rate, spec.seed)], "train/loss": [1.0]}
            curves = {name: Curve([0], value) for name, value in {**values, "time/step": [1.0]}.items()}
            self.runs[spec.key()] = Run(spec.key(), spec.identity(), "done", "", "made up", curves)
            self.left -= 1.25 * spec.steps
        return self.left > 0

    def decide(self, *claims, **options):
        return decide(
            claims,
            lambda specs: {key: self.runs[key] for spec in specs if (key := spec.key()) in self.runs},
            self.train,
            lambda: self.left,
            lambda runs: Costs(runs, {}),
            jobs=1,
            **options,
        )


def noise(rate: float, seed: int) -> float:
    return random.Random(f"{rate} {seed}").gauss(0, 1)


def test_seeds_are_added_look_by_look_until_the_claim_is_decided():
    lab = Lab(lambda rate, seed: 1.8 + noise(rate, seed))
    (one,) = lab.decide(claim("a", 0.1))
    assert one.judged.verdict == "supported"
    assert one.seeds in LOOKS[1:]
    assert [count for _, count in lab.order] == [
        5,
        *(b - a for a, b in pairwise(LOOKS) if b <= one.seeds),
    ]
    part = one.judged.parts[0]
    assert (part.confidence, len(part.values)) == (LOOK_CONFIDENCE, one.seeds)


def test_the_first_look_that_decides_is_the_verdict_whatever_else_is_stored():
    lab = Lab(lambda rate, seed: 3 + 0.1 * noise(rate, seed) if seed < 5 else -50.0)
    lab.train(claim("a", 0.1).needs(40))
    (one,) = lab.decide(claim("a", 0.1))
    assert (one.judged.verdict, one.seeds, len(lab.order)) == ("supported", 5, 1)


def test_the_cheapest_to_decide_comes_first_and_what_does_not_fit_is_said():
    lab = Lab(lambda rate, seed: 3 + 0.1 * noise(rate, seed), seconds=5 * 20 * 1.25 + 10)
    dear, cheap = lab.decide(claim("dear", 0.2, steps=2000), claim("cheap", 0.1, steps=20))
    assert lab.order == [(0.1, 5)]
    assert cheap.is_decided
    assert (dear.judged.verdict, dear.seeds, dear.until) == ("undecided", 0, 5)
    assert dear.cost == pytest.approx(5 * 2000 * 1.25)  # a run of the same kind was measured


def test_no_time_trains_nothing():
    lab = Lab(lambda rate, seed: 3.0, seconds=-1)
    (one,) = lab.decide(claim("a", 0.1))
    assert (lab.order, one.seeds, one.until) == ([], 0, 5)


def test_a_training_that_had_to_stop_ends_it():
    lab = Lab(lambda rate, seed: 1.3 + noise(rate, seed), seconds=5 * 20 * 1.25)
    (one,) = lab.decide(claim("a", 0.1))
    assert (len(lab.order), one.seeds, one.judged.verdict) == (1, 5, "undecided")
    assert one.until > 5


def test_a_claim_without_room_is_not_pursued():
    lab = Lab(lambda rate, seed: 0.5 + 0.3 * noise(rate, seed))
    (one,) = lab.decide(claim("a", 0.1, headroom=Measured({0: 0.1})))
    assert (one.judged.verdict, one.needed, one.until) == ("cannot tell", None, None)
    assert [count for _, count in lab.order] == [5]


def test_other_first_seeds_are_other_runs():
    lab = Lab(lambda rate, seed: 3 + 0.1 * noise(rate, seed))
    lab.decide(claim("a", 0.1))
    (one,) = lab.decide(claim("a", 0.1), first_seed=1000)
    assert len(lab.runs) == 10
    assert sorted(one.judged.parts[0].measured.by_seed) == [1000, 1001, 1002, 1003, 1004]


def test_a_claim_of_two_parts_needs_its_last_support_or_its_first_contradiction():
    def judged(*means):
        values = [Measured({seed: mean + noise(mean, seed) for seed in range(5)}) for mean in means]
        two = Claim("a", "A.", "b", "C.", "D.", specs=lambda seeds: [], effects=lambda evidence: [
            Effect("x", "points", 1.0, value, headroom="none") for value in values])  # fmt: skip
        found = state(two, {}, Costs((), {})).judged
        return seeds_needed(found), [part.seeds_needed for part in found.parts]

    both, needed = judged(1.9, 1.6)
    assert both == max(needed)
    one, needed = judged(1.6, 0.1)
    assert one == needed[1]


def test_looking_five_times_misses_the_mean_as_often_as_one_look_at_95_per_cent():
    draws = np.random.default_rng(0).normal(size=(1500, LOOKS[-1]))

    def missed(confidence):
        found = [
            [Effect("x", "", 1.0, Measured(dict(enumerate(d[:n]))), headroom="", confidence=confidence) for n in LOOKS]
            for d in draws.tolist()
        ]
        return np.mean([any(e.interval[0] > 0 or e.interval[1] < 0 for e in looks) for looks in found])

    assert missed(LOOK_CONFIDENCE) == pytest.approx(0.05, abs=0.015)
    assert missed(0.95) > 0.14


def test_the_cheapest_claims_that_fit_are_run_and_shared_runs_count_once():
    cheap, same, dear = claim("a", 0.1, 100), claim("b", 0.1, 100), claim("c", 0.2, 5000)
    costs = Costs((), {"c": {"seconds_a_seed": 100.0}})

    def chosen(seconds, stored=()):
        found = fitting([dear, cheap, same], seconds, lambda one: one.needs(5), costs, stored=stored, jobs=2)
        return [one.id for one in found]

    assert costs.a_seed(cheap) == pytest.approx(1.0)
    assert costs.a_seed(dear) == pytest.approx(100.0)
    assert chosen(2) == []
    assert chosen(3) == ["a", "b"]
    assert chosen(253) == ["c", "a", "b"]
    assert chosen(0, [spec.key() for spec in dear.needs(5)]) == ["c"]
