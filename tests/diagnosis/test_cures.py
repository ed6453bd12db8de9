"""A line of code in a cure does what it says when it is run as printed."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

import normwise
from normwise.diagnosis import diagnose
from normwise.diagnosis.choices import CHOICES
from normwise.diagnosis.records import Finding
from normwise.diagnosis.rules import cures
from normwise.diagnosis.rules.cures import TEXTS
from normwise.diagnosis.rules.statistics import FEWEST_IN_A_GROUP
from normwise.diagnosis.rules.table import RULES
from normwise.surgery.groups import FEWEST
from support.faults import FAULTS, OverSteps, batches, given, mlp

CALL = r"normwise\.(?:convert|recalibrate|freeze|fold)\([^()]*\)"
ASSIGNMENT = r"model(?:\.get_submodule\('[^']*'\))?\.[\w.]+(?:\[[^=]*\])? = [\w.+-]+"
WITHOUT_BIAS = r"layer, norm = .*\.bias = None"
REPLACED = r"(?:for name in \([^)]*\): )?model\.set_submodule\(.*?\)(?=;|$)"
SCALED = r"a = model\.get_submodule\('[^']*'\)(?:; a\.[^;]*)+"
LINE = re.compile(rf"group = optimizer.*\}}\)|{WITHOUT_BIAS}|{REPLACED}|{SCALED}|(?:\w+, \w+ = )?{CALL}|{ASSIGNMENT}")
# Of these the cure is to build the model otherwise, or to mend the data.
BUILT_OTHERWISE = {"NW015 shared", "NW020"}
BUILT_OTHERWISE |= {name for name in FAULTS if name.startswith(("NW017", "NW018", "NW019", "NW021"))}


def lines(cure: str) -> list[str]:
    return LINE.findall(cure)


def faulty(name: str) -> dict[str, Any]:
    """The same model and data each time."""
    torch.manual_seed(0)
    return FAULTS[name](True)


def found(arguments: dict[str, Any], code: str) -> list[Finding]:
    return [finding for finding in diagnose(**arguments).findings if finding.code == code]


def cured(arguments: dict[str, Any], line: str) -> dict[str, Any]:
    """The arguments after a line was run on them."""
    names = {"normwise": normwise, "torch": torch, **arguments}
    exec(line, names)
    return {name: names[name] for name in arguments}


@pytest.mark.parametrize("name", [name for name in FAULTS if name not in BUILT_OTHERWISE])
def test_the_finding_is_gone_after_each_line_of_its_cure(name):
    code = name.split()[0]
    first, *_ = found(faulty(name), code)
    assert lines(first.cure), first.cure
    for line in lines(first.cure):
        arguments = cured(faulty(name), line)
        if isinstance(arguments["model"], OverSteps):
            arguments["model"].faulty = False  # the rest of the cure: the call with lengths
        assert not found(arguments, code), line


def test_a_cure_of_the_whole_model_is_a_line_too():
    """A norm that is the model has no name to be got at by."""
    data = [(torch.randn(32, 6), torch.randint(6, (32,))) for _ in range(2)]
    for layer, code in ((nn.BatchNorm1d(6, momentum=0.99), "NW006"), (nn.LayerNorm(6, eps=1e-12).half(), "NW009")):
        half = layer.weight.dtype == torch.float16
        arguments = given(layer, [(x.half(), y) if half else (x, y) for x, y in data])
        arguments["loss"] = lambda output, target: nn.functional.cross_entropy(output.float(), target)
        (finding,) = found(arguments, code)
        (line,) = lines(finding.cure)
        assert not found(cured(arguments, line), code)


@pytest.mark.parametrize(("width", "to"), [(2, {"renorm"}), (3, {"renorm"}), (4, {"group", "renorm"})])
def test_few_values_of_few_features_are_not_cured_by_a_norm_of_too_few(width, to):
    assert FEWEST_IN_A_GROUP == FEWEST
    for samples, maps, targets in ((4, (), to), (2, (3,), to), (2, (2, 2), {"group", "renorm"})):
        norm = nn.BatchNorm2d(width) if len(maps) == 2 else nn.BatchNorm1d(width)
        model = nn.Sequential(norm, nn.Flatten(), nn.LazyLinear(3))
        data = batches(samples, (width, *maps))
        model(data[0][0])
        (finding,) = found(given(model, data), "NW001")
        assert set(re.findall(r"to='(\w+)'", finding.cure)) == targets
        for line in lines(finding.cure):
            assert not found(cured(given(model, data), line), "NW001")


def test_batch_statistics_inside_a_recurrence_are_cured_where_it_is_built():
    model = normwise.LSTM(5, 8, norm="batch", num_stat_steps=12)
    data = [(torch.randn(12, 8, 5), torch.randn(12, 8, 8))]
    loss = lambda output, target: (output[0] - target).square().mean()  # noqa: E731
    (finding,) = found({"model": model, "batches": data, "loss": loss}, "NW001")
    assert "norm='layer'" in finding.cure
    assert not lines(finding.cure)


def test_the_conversion_to_synchronized_norms():
    (line,) = lines(next(rule.cure for rule in RULES if rule.code == "NW007"))
    assert type(cured({"model": mlp()}, line)["model"][1]) is normwise.SyncBatchNorm


def test_what_converts_a_model_keeps_the_result():
    """convert and fold return another model; run without `model, _ =` the line would change nothing."""
    texts = (
        [rule.cure for rule in RULES]
        + [*TEXTS.values()]
        + [choice.code for choices in CHOICES.values() for choice in choices]
    )
    calls = [call for text in texts for call in re.findall(r"(\S+ \S+ \S+ |^|\S* )?normwise\.(?:convert|fold)\(", text)]
    assert len(calls) >= 8
    assert all(call == "model, _ = " for call in calls)


def test_a_bias_that_is_taken_out_changes_no_output():
    arguments = faulty("NW005")
    model, (x, _) = arguments["model"], arguments["batches"][0]
    model(x)
    before = model.eval()(x)
    (finding,) = found(arguments, "NW005")
    model.eval()
    (line,) = lines(finding.cure)
    assert model[0].bias.abs().max() > 0.01
    torch.testing.assert_close(cured(arguments, line)["model"](x), before)
    assert model[0].bias is None
    without = nn.Sequential(nn.Conv1d(5, 8, 1), nn.InstanceNorm1d(8))
    text = cures.without_bias(*diagnose(without, [torch.randn(4, 5, 6)], loss=lambda y, _: y.square().sum()).layers)
    assert text == "model.get_submodule('0').bias = None"


def test_norms_are_put_behind_convolutions_too():
    convolutions = nn.Sequential()
    for _ in range(9):
        convolutions.extend([nn.Conv2d(4, 4, 3, padding=1), nn.Tanh()])
        nn.init.normal_(convolutions[-2].weight, std=0.03)
    model = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(64, 3))
    arguments = given(model, batches(32, (4, 4, 4)))
    (finding,) = found(arguments, "NW014")
    (line,) = lines(finding.cure)
    assert "normwise.BatchNorm2d(model.get_submodule(name).out_channels)" in line
    assert not found(cured(arguments, line), "NW014")
    mixed = nn.Sequential(nn.Conv2d(4, 4, 1), *convolutions, nn.Flatten(), nn.Linear(64, 8), nn.Linear(8, 3))
    (finding,) = found(given(mixed, batches(32, (4, 4, 4))), "NW014")
    assert not lines(finding.cure)  # two kinds of layers: words


@pytest.mark.parametrize(
    ("shape", "layer"),
    [
        ((8, 6), "normwise.LayerNorm(6)"),
        ((8, 5, 6), "normwise.LayerNorm(6)"),
        ((8, 6, 5), "normwise.LayerNorm(6, dim=1)"),
        ((8, 6, 5, 5), "normwise.LayerNorm(6, dim=1)"),
        ((8, 6, 6), None),
        ((8, 5, 5), None),
    ],
)
def test_a_norm_is_over_the_axis_that_has_the_features(shape, layer):
    assert cures._layer_norm(shape, 6) == layer
    if layer is not None:
        assert eval(layer, {"normwise": normwise})(torch.randn(shape)).shape == shape
