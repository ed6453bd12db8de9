from __future__ import annotations

import math

import pytest

from normwise.lab.verdict import Check, Effect, Measured, combined, log2_ratio, per_halving


def effect(*values: float, minimum: float = 1.0) -> Effect:
    return Effect("an effect", "points", minimum, Measured(dict(enumerate(values))))


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
    assert (low, high) == pytest.approx((2 - 4.303 / math.sqrt(3), 2 + 4.303 / math.sqrt(3)))
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
