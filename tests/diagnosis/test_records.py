"""A diagnosis is data: it survives JSON, and names what it does not have."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

import normwise
from normwise.diagnosis import Diagnosis, diagnose
from normwise.diagnosis.distributions import Gathered, Moments, distribution
from normwise.diagnosis.records import PERCENTILES
from normwise.diagnosis.table import number


@pytest.fixture
def found() -> Diagnosis:
    net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Sigmoid(), nn.Linear(5, 3))
    with torch.no_grad():
        net[1].running_mean[2] = math.inf
    batches = [(torch.randn(20, 6), torch.randint(3, (20,))) for _ in range(2)]
    return diagnose(net, batches, loss=nn.functional.cross_entropy)


def test_survives_json(found):
    text = found.to_json()
    json.loads(text, parse_constant=pytest.fail)  # strict JSON: no NaN, no Infinity
    again = Diagnosis.from_json(text)
    assert again.to_json() == text
    assert again.layer("1").norm.running.distance.nonfinite == 1
    plain = Diagnosis.from_dict(found.to_dict())
    assert plain.to_json() == text
    assert type(plain.layers[0].output.all) is type(found.layers[0].output.all)


@pytest.mark.parametrize(
    ("text", "error", "said"),
    [
        ("/tmp/nope.json", ValueError, r"but got str \('/tmp/nope\.json'\): give the text .* Path\(p\)\.read_text\(\)"),
        (Path("nope.json"), TypeError, r"but got \w+Path .*read_text\(\)"),
        ("[1, 2]", ValueError, r"but got that of list \(\[1, 2\]\)"),
    ],
)
def test_what_is_no_json_of_a_diagnosis_is_refused(text, error, said):
    with pytest.raises(error, match=f"text must be the JSON of a diagnosis, {said}"):
        Diagnosis.from_json(text)


def test_another_version_is_refused(found):
    with pytest.raises(ValueError, match=r"format version 999.*diagnose the model again"):
        Diagnosis.from_dict(found.to_dict() | {"version": 999})


def test_an_unknown_layer_is_named_with_those_there_are(found):
    assert found.layer("2").kind == "Sigmoid"
    with pytest.raises(KeyError, match="no layer 'conv': the layers are '0', '1', '2', '3'"):
        found.layer("conv")


def test_a_layers_repr_is_a_line_of_its_main_numbers(found):
    for layer in found.layers:
        assert len(repr(layer)) < 200, repr(layer)
    norm = found.layer("1")
    start = f"<Layer '1': BatchNorm1d, output 20x5, mean {number(norm.output.all.mean)}, std "
    assert repr(norm).startswith(start)
    assert repr(norm).endswith("; has .input, .output, .gradient, .norm, .gap>")
    unused = nn.Sequential(nn.Linear(2, 2), nn.Identity())
    unused.forward = lambda x: unused[0](x)
    layers = diagnose(unused, [torch.randn(4, 2)], loss=lambda y, _: y.sum()).layers
    assert "never called" in repr(layers[-1])
    assert len(repr(norm.norm)) < 1500  # in which distributions are lines too
    assert repr(norm.norm.running.distance).endswith(", 1 not finite>")
    assert repr(norm.input.all).startswith("<Distribution of 200: mean ")
    histogram = norm.input.all.histogram
    assert repr(histogram).startswith(f"<Histogram of {sum(histogram.counts)}: {len(histogram.counts)} bins from ")


def test_what_has_a_number_for_each_step_has_a_short_repr():
    model = normwise.LSTM(5, 4, norm="batch", num_stat_steps=90, batch_first=True)
    data = [torch.randn(6, 90, 5) for _ in range(2)]
    (layer,) = diagnose(model, data, loss=lambda y, _: y[0].sum()).layers
    time = layer.output.time
    ends = (
        f"mean {number(time.mean[0])} to {number(time.mean[-1])}, std {number(time.std[0])} to {number(time.std[-1])}"
    )
    assert repr(time) == f"<OverTime of 90 steps, first to last: {ends}; has .mean, .std, .percentiles>"
    assert repr(dataclasses.replace(time, mean=[], std=[])) == (
        "<OverTime of 0 steps, first to last: no mean, no std; has .mean, .std, .percentiles>"
    )
    (recurrence,) = layer.recurrence
    assert repr(layer.output).startswith(f"<Activations 6x90x4, float32: mean {number(layer.output.all.mean)}, std ")
    assert repr(layer.output).endswith("; has .all, .features, .samples, .time>")
    assert repr(recurrence).startswith("<Recurrence 'l0': lstm, norm 'batch', saturated i ")
    assert repr(recurrence.gates[0]).startswith("<Gate 'i': ")
    for one in (time, layer.output, recurrence, *recurrence.gates):
        assert len(repr(one)) < 200, repr(one)


def test_distribution_of_everything_in_parts():
    x = torch.randn(3, 4000, dtype=torch.float64) * 3 + torch.tensor([[0.0], [50.0], [-7.0]], dtype=torch.float64)
    gathered = Gathered()
    for part in x:
        gathered.add(part)
    found = gathered.distribution()
    assert found.count == 12000
    assert found.mean == pytest.approx(float(x.mean()), rel=1e-12)
    assert found.std == pytest.approx(float(x.std(correction=0)), rel=1e-12)
    assert (found.minimum, found.maximum) == (float(x.min()), float(x.max()))
    expected = torch.quantile(x.flatten(), torch.tensor(PERCENTILES, dtype=torch.float64) / 100)
    assert found.percentiles == pytest.approx(expected.tolist())
    assert found.percentile(50) == pytest.approx(float(x.median()), abs=0.01)
    assert sum(found.histogram.counts) == 12000


def test_non_finite_values_are_counted_and_left_out():
    found = distribution([1.0, math.nan, 3.0, math.inf])
    assert (found.count, found.nonfinite, found.mean, found.std) == (2, 2, 2.0, 1.0)
    assert math.isnan(distribution([]).mean)


def test_moments_of_parts_far_from_zero():
    """A difference of large sums would lose every digit."""
    x = torch.randn(5, 100, dtype=torch.float64) + 1e9
    moments = Moments()
    for part in x:
        moments.add(torch.tensor(100), part.mean(), part.var(correction=0))
    assert float(moments.var) == pytest.approx(float(x.var(correction=0)), rel=1e-6)
