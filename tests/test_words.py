"""Messages count in plain English."""

from __future__ import annotations

from normwise.backends.words import counted
from normwise.diagnosis.records import Diagnosis
from normwise.diagnosis.rules.rule import Match, Rule


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
