"""Messages count in plain English."""

from __future__ import annotations

import torch

from normwise.diagnosis.records import Diagnosis
from normwise.diagnosis.rules.rule import Match, Rule
from normwise.words import MOST, counted, did_you_mean, given, nearest


def test_one_is_one_and_the_others_are_several() -> None:
    assert [counted(n, "batch") for n in (0, 1, 2)] == ["0 batches", "1 batch", "2 batches"]
    assert [counted(n, "bias") for n in (1, 3)] == ["1 bias", "3 biases"]
    assert [counted(n, "axis") for n in (1, 2)] == ["1 axis", "2 axes"]
    assert [counted(n, "computed part") for n in (1, 1234)] == ["1 computed part", "1,234 computed parts"]


def test_the_texts_of_findings_count_so_too() -> None:
    for gains, said in ((1, "1 gain of 0.50"), (2, "2 gains of 0.50"), (3000, "3,000 gains of 0.50")):
        found = Match("", {"gains": gains, "share": 0.5})
        rule = Rule("NW000", "", "info", lambda _, found=found: [found], "{gains:1 gain} of {share:.2f}", "{gains}")
        (finding,) = rule.findings(Diagnosis.__new__(Diagnosis))
        assert (finding.cause, finding.cure) == (said, str(gains))


def test_what_was_given_is_named_by_kind_and_value_on_one_short_line() -> None:
    assert given("0.1") == "str ('0.1')"
    assert given(None) == "NoneType (None)"
    long = given([[1, 2]] * 100)
    assert long.startswith("list ([[1, 2], ")
    assert long.endswith("...)")
    assert len(long) == len("list ()") + MOST

    class Lines:
        def __repr__(self) -> str:
            return "a\n  b"

    assert given(Lines()) == "Lines (a b)"


def test_what_was_perhaps_meant_is_found_by_slip_case_class_and_other_name() -> None:
    known = ("batch", "layer", "group", "norm_only")
    for slip in ("groups", "Group", "GroupNorm", "group_norm", torch.nn.GroupNorm, torch.nn.GroupNorm(1, 1), "gn"):
        assert nearest(slip, known, {"gn": "group"}) == ["group"], slip
    assert nearest(torch.nn.BatchNorm2d, known) == ["batch"]
    assert nearest("normonly", known) == ["norm_only"]
    assert did_you_mean("lyer", known) == "; did you mean 'layer'?"
    for other in ("spectral", None, 3, torch.nn.Linear, ""):
        assert did_you_mean(other, known) == "", other
