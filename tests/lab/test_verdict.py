from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from normwise.lab.verdict import Check, Effect, Measured, combined, lacks, log2_ratio, per_halving


def effect(*values: float, minimum: float = 1.0, headroom: Measured | str = "no ceiling") -> Effect:
    return Effect("an effect", "points", minimum, Measured(dict(enumerate(values))), headroom=headroom)


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        # mean 2, half-width 4.303 * 0.1 / sqrt(3) = 0.248
        ((1.9, 2.0, 2.1), "supported"),
        ((0.1, 0.2, 0.3), "contradicted"),
        ((-2.0, -2.1, -1.9), "contradicted"),
        # mean 1.2, the same half-width: 1 lies inside
        ((1.1, 1.2, 1.3), "undecided"),
        ((0.9, 1.0, 1.1), "undecided"),
        ((2.0, 2.0), "undecided"),
        ((100.0,), "undecided"),
        ((), "undecided"),
        ((1.0, 1.0, 1.0), "supported"),
        ((2.0, 2.0, math.inf), "undecided"),
    ],
)
def test_an_effect_s_verdict(values, verdict):
    assert effect(*values).verdict == verdict


def test_no_worse_is_a_negative_minimum():
    assert effect(-0.01, 0.0, 0.01, minimum=-0.5).verdict == "supported"
    assert effect(-0.9, -1.0, -1.1, minimum=-0.5).verdict == "contradicted"


def test_the_interval_is_student_s_t():
    low, high = effect(1.0, 2.0, 3.0).interval
    t = 4.302652729911275  # at 2 degrees of freedom, from a table
    assert (low, high) == pytest.approx((2 - t / math.sqrt(3), 2 + t / math.sqrt(3)))
    assert effect(1.0).interval is None


def test_what_would_decide():
    assert effect(2.0, 2.0).would_decide.startswith("2 of the 3 seeds that a verdict needs")
    assert effect(1.9, 2.0, 2.1).would_decide == ""
    # spread 1, away from the minimum by 1: t * 1 / sqrt(n) < 1 first at n = 7 (2.447 / 2.646)
    assert effect(1.0, 2.0, 3.0).would_decide == "about 7 seeds would decide, if effect and spread stay what they are"
    assert "more than 200 seeds" in effect(0.0, 1.0, 2.0).would_decide


def test_arithmetic_pairs_by_seed_and_remembers_the_runs():
    a, b = Measured({0: 3.0, 1: 5.0, 2: 7.0}, ("a", "x")), Measured({1: 1.0, 2: 2.0, 3: 9.0}, ("b", "x"))
    assert (a - b) == Measured({1: 4.0, 2: 5.0}, ("a", "x", "b"))
    assert (a + b).by_seed == {1: 6.0, 2: 9.0}
    assert (-a).by_seed == {0: -3.0, 1: -5.0, 2: -7.0}
    assert (100 * b).by_seed == {1: 100.0, 2: 200.0, 3: 900.0}


def test_log2_ratio_leaves_out_what_has_none():
    a, b = Measured({0: 8.0, 1: 0.0, 2: 1.0}), Measured({0: 2.0, 1: 1.0, 2: 4.0})
    assert log2_ratio(a, b).by_seed == {0: 2.0, 2: -2.0}


def test_per_halving_is_the_slope_of_a_line():
    assert per_halving({64: Measured({0: 1.0}), 8: Measured({0: 1.6}), 2: Measured({0: 2.0})}).by_seed == pytest.approx(
        {0: 0.2}
    )


@pytest.mark.parametrize(("value", "at_most", "verdict"), [(1.0, True, "supported"), (1.0, False, "supported")])
def test_a_check_at_its_limit_holds(value, at_most, verdict):
    assert Check("x", value, 1.0, at_most).verdict == verdict
    assert Check("x", 2.0 if at_most else 0.0, 1.0, at_most).verdict == "contradicted"
    assert Check("x", math.nan, 1.0, at_most).verdict == "contradicted"


def test_combined():
    assert combined(["supported", "supported"]) == "supported"
    assert combined(["supported", "undecided"]) == "undecided"
    assert combined(["undecided", "contradicted"]) == "contradicted"
    assert combined([]) == "undecided"
    assert combined(["supported", "cannot tell"]) == "cannot tell"
    assert combined(["undecided", "cannot tell"]) == "undecided"  # seeds may still contradict it
    assert combined(["contradicted", "cannot tell"]) == "contradicted"


def level(*values: float) -> Measured:
    return Measured(dict(enumerate(values)))


def test_no_difference_is_no_verdict_without_room_for_one():
    none = (0.0, 0.1, -0.1, 0.05)
    assert effect(*none, headroom=level(2.0, 2.1, 2.0, 1.9)).verdict == "contradicted"
    full = effect(*none, headroom=level(1.9, 1.8, 1.9, 1.7))
    assert (full.verdict, full.seeds_needed) == ("cannot tell", None)
    assert full.reason == ("no room: the best arm lacks 1.82 points of the best that is possible, and to tell takes 2")
    assert full.would_decide == "no number of seeds would decide; a task with more room would"
    no_worse = effect(*none, minimum=-1.0, headroom=level(1.9, 1.8, 1.9, 1.7))
    assert (no_worse.verdict, no_worse.would_decide) == ("cannot tell", full.would_decide)
    assert effect(*none, headroom=Measured({})).verdict == "cannot tell"


@pytest.mark.parametrize(
    ("values", "minimum", "verdict"),
    [
        ((4.9, 5.0, 5.1), 1.0, "supported"),
        ((-5.1, -5.0, -4.9), 1.0, "contradicted"),
        ((4.9, 5.0, 5.1), -1.0, "supported"),
        ((-5.1, -5.0, -4.9), -1.0, "contradicted"),
        ((20.0, 30.0, 50.0, 40.0), 1.0, "supported"),  # a planted effect of 2 would be lost in this spread
        ((-20.0, -30.0, -50.0, -40.0), 1.0, "contradicted"),
    ],
)
def test_a_difference_that_is_shown_needs_no_room(values, minimum, verdict):
    assert effect(*values, minimum=minimum, headroom=level(0.1, 0.1, 0.1)).verdict == verdict


def test_without_room_seeds_are_waited_for_only_where_they_could_show_a_difference():
    full = level(0.1, 0.1, 0.1)
    assert effect(1.1, 1.2, 1.3, headroom=full).verdict == "undecided"
    assert effect(0.7, 0.8, 0.9, headroom=full).verdict == "cannot tell"
    assert effect(-1.3, -1.2, -1.1, minimum=-1.0, headroom=full).verdict == "undecided"
    assert effect(-0.9, -0.8, -0.7, minimum=-1.0, headroom=full).verdict == "cannot tell"


def test_no_difference_is_no_verdict_where_a_planted_one_would_be_missed():
    # The interval is below 1 and reaches to -0.3, so it shows nothing; planted at 2, it would begin below 1.
    noisy = effect(-3.0, -1.5, -2.0, -4.5, -0.2)
    assert noisy.interval[1] < 1
    assert noisy.verdict == "cannot tell"
    assert noisy.power < 0.8
    assert noisy.reason.startswith("too few seeds for the spread: an effect of 2 points, planted, is found in ")
    assert len(noisy.values) < noisy.seeds_needed < 30
    assert noisy.would_decide.startswith(f"about {noisy.seeds_needed} seeds would decide")


@pytest.mark.parametrize("minimum", [1.0, -1.0])
@pytest.mark.parametrize(
    ("count", "spread", "lower"), [(5, 0.8, 0.13), (10, 0.9, 0.06), (10, 1.5, 0.06), (30, 2.0, 0.05)]
)
def test_the_power_is_that_of_student_s_t(minimum, count, spread, lower):
    """Against the noncentral t distribution: mean of the resampled power over normal samples. With few it is lower."""
    draws = np.random.default_rng(1).normal(0, spread, (30, count))
    draws = (draws - draws.mean(1, keepdims=True)) / draws.std(1, ddof=1, keepdims=True) * spread
    found = [effect(*sample, minimum=minimum).power for sample in draws.tolist()]
    exact = stats.nct.sf(stats.t.ppf(0.975, count - 1), count - 1, math.sqrt(count) / spread)
    assert exact - lower < np.mean(found) < exact + 0.05


def test_the_interval_covers_the_mean_as_often_as_it_says():
    draws = np.random.default_rng(2).normal(0, 1, (3000, 5)).tolist()
    covered = [low <= 0 <= high for low, high in (effect(*sample).interval for sample in draws)]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.01)


@pytest.mark.parametrize(("true", "wrong"), [(1.0, "contradicted"), (0.99, "supported"), (2.0, "contradicted")])
def test_a_wrong_verdict_is_as_rare_as_the_interval_says(true, wrong):
    draws = np.random.default_rng(3).normal(true, 0.5, (2000, 5)).tolist()
    verdicts = [effect(*sample).verdict for sample in draws]
    assert verdicts.count(wrong) / len(verdicts) < 0.035


def test_the_seeds_needed_do_decide():
    """Of experiments with as many seeds as are said to be needed about half decide, or more: a point estimate."""
    first = effect(*np.random.default_rng(4).normal(1.6, 1.0, 5).tolist())
    assert first.verdict == "undecided"
    draws = np.random.default_rng(5).normal(first.mean, first.spread, (400, first.seeds_needed)).tolist()
    decided = np.mean([effect(*sample).verdict != "undecided" for sample in draws])
    assert 0.4 < decided < 0.75


def test_seeds_needed():
    assert effect(1.9, 2.0, 2.1).seeds_needed == 3
    assert effect(1.0, 2.0).seeds_needed == 3
    assert effect(1.0, 2.0, 3.0).seeds_needed == 7
    assert effect(0.0, 1.0, 2.0).seeds_needed is None


def test_what_the_best_arm_lacks():
    low, high = level(80.0, 82.0, 81.0), level(90.0, 70.0, 95.0)
    assert lacks(100, low, high).by_seed == {0: 10.0, 1: 30.0, 2: 5.0}
    assert lacks(0, low, high).by_seed == {0: 80.0, 1: 82.0, 2: 81.0}
    assert lacks(100, level(12.0), level(11.0), worst=10).by_seed == {0: 2.0}  # neither has learned anything
    assert lacks(100, Measured({}), low).by_seed == {0: 20.0, 1: 18.0, 2: 19.0}
    assert lacks(100, Measured({})).by_seed == {}


def test_a_smallest_effect_of_0_is_refused():
    with pytest.raises(ValueError, match="an effect: the smallest effect is 0, expected a number that"):
        effect(1.0, minimum=0)
