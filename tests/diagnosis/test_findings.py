"""Each finding is raised by a model that has the fault, and not by its near twin."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import normwise
from normwise.diagnosis import Diagnosis, diagnose
from normwise.diagnosis.records import SEVERITIES
from normwise.diagnosis.rules.table import BY_CODE, RULES
from support.faults import FAULTS, batches, given, mlp
from support.foreign_layers import MaxNorm


def codes(found: Diagnosis) -> set[str]:
    return {finding.code for finding in found.findings}


@pytest.mark.parametrize("name", FAULTS)
def test_is_found_in_the_faulty_model_and_not_in_its_twin(name):
    code = name.split()[0]
    arguments = FAULTS[name](True)
    faulty = diagnose(**arguments)
    assert code in codes(faulty)
    assert code not in codes(diagnose(**FAULTS[name](False)))
    for finding in faulty.findings:
        assert finding.severity in SEVERITIES
        assert finding.layer in ("", *faulty.places)
        assert arguments["model"].get_submodule(finding.layer) is not None
        assert finding.evidence
        assert "{" not in finding.cause
        assert "nan" not in finding.cure
    assert Diagnosis.from_json(faulty.to_json()).findings == faulty.findings


def test_every_rule_has_its_faulty_model():
    assert {name.split()[0] for name in FAULTS} | {"NW007"} == set(BY_CODE)
    assert [rule.code for rule in RULES] == [f"NW{n:03d}" for n in range(1, 22)]


@pytest.mark.parametrize(("ranks", "samples", "raised"), [(2, 8, True), (1, 8, False), (2, 32, False)])
def test_statistics_of_each_rank_under_ddp(ranks, samples, raised):
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        model = nn.parallel.DistributedDataParallel(mlp())
        found = diagnose(model, batches(samples), loss=nn.functional.cross_entropy)
    finally:
        torch.distributed.destroy_process_group()
    assert (found.wrapper, found.ranks) == ("DistributedDataParallel", ranks)
    assert ("NW007" in codes(found)) == raised


def test_the_gravest_come_first():
    arguments = FAULTS["NW003"](True)
    arguments["model"][0].bias = nn.Parameter(torch.zeros(8))
    found = diagnose(**arguments)
    assert [finding.code for finding in found.findings] == ["NW003", "NW005"]
    assert found.findings[0].severity == "error"


def test_a_fresh_model_has_no_stale_statistics_but_a_layer_left_behind_has():
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    data = [(inputs * 5 + 2, target) for inputs, target in batches(64)]
    assert "NW002" not in codes(diagnose(**given(net, data)))
    net[3].momentum = 0.0
    net[2].weight.data *= 5
    for inputs, _ in 40 * data:
        net(inputs)
    found = [finding.layer for finding in diagnose(**given(net, data)).findings if finding.code == "NW002"]
    assert found == ["3"]


def test_zero_gains_at_the_start_are_not_dead():
    """Goyal et al. 2017: the last norm of a residual branch starts from 0."""
    model = mlp()
    nn.init.zeros_(model[1].weight)
    assert "NW008" not in codes(diagnose(**given(model, batches())))


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_weight_decay_on_a_weight_beside_an_offset_is_left_alone(offset):
    """It pulls the gain to 1, not to 0."""
    model = mlp(normwise.LayerNorm(8, bias=False, offset=offset))
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    found = codes(diagnose(**given(model, batches()), optimizer=optimizer))
    assert ("NW011" in found) is (offset == 0)


def test_gains_are_what_the_layer_multiplies_by():
    norm = normwise.LayerNorm(8, offset=1.0)
    (record,) = (layer.norm for layer in diagnose(**given(mlp(norm), batches())).layers if layer.norm is not None)
    assert (record.gain.mean, record.offset, record.dead_gains) == (1.0, 1.0, [])


def test_padding_told_in_other_ways():
    """By a mask of either convention, by nothing but zeros, or in a batch that has none."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.BatchNorm1d(5), nn.Linear(5, 3)

        def forward(self, x: torch.Tensor, **_: torch.Tensor) -> torch.Tensor:
            return self.linear(self.norm(x.transpose(1, 2)).mean(2))

    lengths = torch.randint(4, 12, (32,))
    lengths[0] = 12
    valid = torch.arange(12) < lengths[:, None]
    x, target = (torch.randn(32, 12, 5) + 2) * valid[..., None], torch.randint(3, (32,))
    told = {
        "mask": {"x": x, "mask": valid},
        "src_key_padding_mask": {"x": x, "src_key_padding_mask": ~valid},
        "trailing zeros": {"x": x},
    }
    for told_by, inputs in told.items():
        found = diagnose(Net(), [(inputs, target)], loss=nn.functional.cross_entropy)
        assert found.data.told_by == told_by
        assert found.data.padding == pytest.approx(1 - float(valid.double().mean()))
        assert "NW004" in codes(found)
    full = {"x": torch.randn(32, 12, 5), "mask": torch.ones(32, 12, dtype=torch.bool)}
    assert "NW004" not in codes(diagnose(Net(), [(full, target)], loss=nn.functional.cross_entropy))


@pytest.mark.parametrize(
    ("norm", "samples", "values"),
    [
        (normwise.BatchRenorm1d(8), 8, None),  # leans on running statistics: it is a cure
        (normwise.BatchNorm1d(8, virtual_batch_size=8), 32, 8),
        (normwise.BatchNorm1d(8, virtual_batch_size=16), 32, None),
        (normwise.FrozenBatchNorm1d(8), 8, None),
        (nn.LayerNorm(8), 1, None),
    ],
)
def test_how_many_values_a_statistic_comes_from(norm, samples, values):
    found = diagnose(mlp(norm), batches(samples), loss=nn.functional.cross_entropy).findings
    assert [f.evidence["values"] for f in found if f.code == "NW001"] == ([] if values is None else [values])


def test_an_eps_that_the_dtype_cannot_hold():
    """1e-12, as many language models have it, is 0 in float16."""
    for eps, raised in ((1e-12, True), (1e-5, False)):
        model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8, eps=eps), nn.Linear(8, 3)).half()
        data = [(inputs.half(), target) for inputs, target in batches()]
        found = diagnose(model, data, loss=lambda output, target: nn.functional.cross_entropy(output.float(), target))
        assert ("NW009" in codes(found)) == raised


def test_the_first_layer_that_is_not_finite_is_named():
    expected = {
        "NW017": ("after", "since 'norm', called before it"),
        "NW017 gradient": ("norm", "On the way back.*between it and 'after'"),
        "NW017 loss": ("", "No layer has it"),
        "NW017 scores": ("softmax", "since 'linear'"),
    }
    for name, (layer, words) in expected.items():
        (finding,) = [f for f in diagnose(**FAULTS[name](True)).findings if f.code == "NW017"]
        assert finding.layer == layer, name
        assert re.search(words, finding.cause), finding.cause


def test_batches_that_are_not_finite_are_said_to_be():
    data = batches()
    data[1][0][2, 3] = torch.inf
    for norm in (nn.LayerNorm(8), nn.BatchNorm1d(8)):  # with BatchNorm there is a NW003 besides
        first, *_ = diagnose(**given(mlp(norm), data)).findings
        assert (first.code, first.layer) == ("NW017", "")
        assert first.cause.startswith("The data hold NaN or infinity: 1 value of the inputs of batch 1. From there ")
        assert "x.nan_to_num()" in first.cure


def test_parameters_that_are_not_finite_are_named_before_all_that_follows():
    model = mlp()
    with torch.no_grad():
        model[0].weight[2, 3] = torch.nan
    found = diagnose(**given(model, batches()))
    assert found.nonfinite.parameters == {"0.weight": [1, 48]}
    first, second = found.findings[:2]
    assert (first.code, first.layer, second.code) == ("NW017", "0", "NW003")
    given_with = "The model was given with NaN or infinity in its parameters: 0.weight (1 of 48). From there "
    assert first.cause.startswith(given_with)
    (line,) = re.findall(r"model\.get_submodule\('0'\)\.reset_parameters\(\)", first.cure)
    exec(line, {"model": model})
    assert "NW017" not in codes(diagnose(**given(model, batches())))


def test_a_parameter_that_a_step_spoils_was_not_given_so():
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    found = diagnose(**given(model, batches(count=3), optimizer=torch.optim.SGD(model.parameters(), lr=1e38)))
    assert found.nonfinite.parameters == {}


def test_a_loss_that_the_steps_drive_away_is_found():
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    found = diagnose(**given(model, batches(count=3), optimizer=torch.optim.SGD(model.parameters(), lr=1e38)))
    (finding,) = [f for f in found.findings if f.code == "NW017"]
    assert "of the watched steps" in finding.cause


class RMS(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


class LlamaRMSNorm(RMS):
    """A name of a norm on the class."""


class Scale(RMS):
    """No name of a norm, and none: it keeps what is normal."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x


class Peak(MaxNorm):
    """A norm of a kind that normwise has not, under a name that says nothing."""


def drifting(layer: type[nn.Module], name: str) -> nn.Sequential:
    net = nn.Sequential()
    for place in range(10):
        net.add_module(f"linear{place}", nn.Linear(6, 6))
        net.add_module(f"{name}{place}", layer(6))
        nn.init.normal_(net[-2].weight, std=0.1)
    return net.append(nn.Linear(6, 3))


@pytest.mark.parametrize(
    ("layer", "name", "missing", "unknown"),
    [
        (RMS, "a", False, False),
        (LlamaRMSNorm, "a", False, False),
        (MaxNorm, "a", False, True),
        (Peak, "ln_", False, True),
        (Scale, "scale", True, False),
        (Scale, "normal", True, False),
    ],
)
def test_somebodys_own_norm_is_no_missing_norm(layer, name, missing, unknown):
    found = diagnose(**given(drifting(layer, name), batches()))
    assert any("no norm" in f.cause.lower() for f in found.findings) == missing
    notes = [note for note in found.notes if note.startswith("unknown layers that may be norms")]
    assert len(notes) == unknown
    if unknown:
        assert f"{name}0 ({layer.__name__})" in notes[0]
    assert ("NW014" in codes(found)) == missing


def test_a_mask_of_infinities_among_the_inputs_is_not_blamed():
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.out = nn.Linear(5, 8), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            weights = torch.softmax(mask, 1)[..., None]
            return self.out(torch.log((self.linear(x) * weights).sum(1)))

    valid = torch.arange(12) < torch.randint(4, 13, (32, 1))
    mask = torch.zeros(32, 12).masked_fill(~valid, -torch.inf)
    data = [((torch.randn(32, 12, 5), mask), torch.randint(3, (32,)))]
    (finding,) = [f for f in diagnose(**given(Masked(), data)).findings if f.code == "NW017"]
    assert finding.layer == "out"
