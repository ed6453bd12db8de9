from __future__ import annotations

import json
import math

import pytest

from normwise.lab.strict_json import to_json


def test_json_has_no_numbers_that_the_standard_lacks():
    value = {"a": [math.nan, (math.inf, 1.5)], "b": {"c": -math.inf}, "d": 1e308, "e": True, "f": None, "g": "é"}
    text = to_json(value)
    assert json.loads(text, parse_constant=pytest.fail) == {
        "a": [None, [None, 1.5]], "b": {"c": None}, "d": 1e308, "e": True, "f": None, "g": "é"
    }  # fmt: skip
    assert text.isascii()
    assert to_json({"b": 1, "a": [2]}, sort_keys=True, compact=True) == '{"a":[2],"b":1}'
