from __future__ import annotations

import pytest
import torch
from torch import nn

import normwise
from normwise.diagnosis.table import WIDTH, as_text, number


@pytest.fixture(scope="module")
def found():
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16, momentum=0.99), nn.ReLU())
    model = nn.ModuleDict({"a_name_that_is_longer_than_its_column": inner, "out": nn.Linear(16, 4)})
    model.forward = lambda x: model["out"](inner(x))
    batches = [(torch.randn(32, 8), torch.randint(4, (32,))) for _ in range(3)]
    return normwise.diagnose(model, batches, loss=nn.functional.cross_entropy, use_pyproject=False)


def test_findings_come_first_each_with_its_cure(found):
    text = as_text(found)
    assert [f.code for f in found.findings] == ["NW006", "NW005"]
    places = [text.index(words) for words in ("NW006 warning", "Cure: momentum=0.01", "NW005 advice", "layer   ")]
    assert places == sorted(places)


def test_it_fits_a_terminal(found):
    lines = as_text(found).splitlines()
    assert max(map(len, lines)) <= WIDTH
    # The end of a long name is what tells layers apart.
    assert any(line.startswith("...") and ".1 " in line and "BatchNorm1d" in line for line in lines)


def test_a_layer_has_its_numbers(found):
    (line,) = [line for line in as_text(found).splitlines() if line.startswith("out ")]
    out = found.layer("out")
    assert line.split() == [
        "out",
        "Linear",
        "32x4",
        number(out.output.all.mean),
        number(out.output.all.std),
        number(out.gradient.output),
    ]


def test_without_findings_it_says_so():
    model = nn.Sequential(nn.Linear(8, 4))
    batches = [(torch.randn(32, 8), torch.randint(4, (32,)))]
    found = normwise.diagnose(model, batches, loss=nn.functional.cross_entropy, use_pyproject=False)
    assert "No findings." in as_text(found)


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, ""), (0.0, "0"), (1.23456, "1.23"), (-1.234e-9, "-1e-09"), (float("nan"), "nan"), (123456.0, "1e+05")],
)
def test_numbers_are_short(value, text):
    assert number(value) == text


@pytest.fixture(scope="module")
def many():
    torch.manual_seed(0)
    layers = [k for _ in range(12) for k in (nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU())]
    batches = [(torch.randn(2, 8), torch.randint(8, (2,))) for _ in range(2)]
    return normwise.diagnose(nn.Sequential(*layers), batches, loss=nn.functional.cross_entropy, use_pyproject=False)


def test_a_code_of_many_layers_is_one_entry(many):
    text = as_text(many)
    heads = [line for line in text.splitlines() if line.startswith("NW")]
    assert [line[:5] for line in heads] == [group.code for group in many.groups]
    assert heads[0] == "NW001 warning  12 layers: batch statistics from very few values"
    assert "    At 1, 4, 7, 10, 13, 16, 19, 22 and 4 more." in text
    assert text.count("In train mode a channel's") == 1
    (bias,) = [group for group in many.groups if group.code == "NW005"]
    first = bias.layers[0]
    assert f"    Cure, for {first}: build '{first}' with bias=False" in text
    assert max(map(len, text.splitlines())) <= WIDTH


def test_findings_stay_one_for_each_layer_in_the_data(many):
    (few, *_) = many.groups
    assert (few.code, few.severity, len(few.findings)) == ("NW001", "warning", 12)
    assert few.layers == [f.layer for f in many.findings if f.code == "NW001"]
    plain = many.to_dict()
    assert len(plain["findings"]) == len(many.findings)
    assert plain["groups"][0]["layers"] == few.layers
    assert normwise.Diagnosis.from_json(many.to_json()) == many


def test_printed_it_is_its_table(many):
    assert str(many) == as_text(many)
    assert len(repr(many)) < 200
    assert "Sequential: 36 layers" in repr(many)
    assert "'NW001': 12" in repr(many)
