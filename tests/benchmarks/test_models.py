"""The suite of whole steps, end to end on a tiny net: what is wrong has no ratio, and what the table tells."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

import normwise
from benchmarks.measure import Probe
from benchmarks.models import CONVERTED, LIMIT, Step, cases
from benchmarks.nets import NETS, Net, Tagger, episodes, images, resnet, rows, sequences
from benchmarks.table import markdown

TINY = {
    "tiny": Net(
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)),
        images(4, 8),
        channels_last=True,
        must=(1.0,),
    ),
    "tiny LSTM": Net(**sequences(Tagger, 3, (4, 5, 1), 2), inputs=rows(6, 2, 3)),
}


def test_a_tiny_net_from_end_to_end() -> None:
    found = [
        {"suite": "models", "case": case.name, "threads": 2} | case.figure(Probe())
        for case in cases(pairs=2, compiles=False, nets=TINY)
    ]
    names = [f["case"] for f in found]
    assert names[:3] == ["tiny, training", "tiny, inference", "tiny, channels-last, training"]
    assert all(f["error"] <= 1 and f["theirs"] > 0 for f in found)
    assert {CONVERTED, LIMIT} <= set(found[0]["ratios"])
    assert LIMIT not in found[-1]["ratios"]  # an LSTM without norms has none to leave out
    assert [f["must"] for f in found[:3]] == [1.0, None, None]
    case = next(iter(cases(nets=TINY)))
    assert "converted" in case.line(found[0])
    machine = {"processor": "CPU", "cores": 2, "isa": "avx512", "torch": "2", "python": "3"}
    told = markdown(
        {
            "own level": {"machine": machine, "figures": found},
            "AVX2": {"machine": machine, "figures": [], "unmeasured": "the processor lacks it"},
        }
    )
    assert "### own level: avx512, 2 threads" in told
    assert "| tiny, training |" in told
    assert "Unmeasured: the processor lacks it." in told


def test_a_wrong_result_has_no_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    convert = normwise.convert

    def wrong(model: nn.Module, to: str) -> tuple[nn.Module, None]:
        other = convert(model, to=to)[0]
        other[1].eps = 0.1
        return other, None

    monkeypatch.setattr(normwise, "convert", wrong)
    figure = Step("tiny", TINY["tiny"], False, True, pairs=2).figure(Probe())
    assert figure["error"] > 1
    assert "ratios" not in figure
    machine = {"processor": "CPU", "cores": 2, "isa": "avx512", "torch": "2", "python": "3"}
    figures = [{"suite": "models", "case": "tiny", "threads": 2} | figure]
    assert "| tiny | wrong result |" in markdown({"own level": {"machine": machine, "figures": figures}})


def test_the_nets_are_torch_s_and_take_their_inputs() -> None:
    """Of ResNet also that it is one: as many parameters as published, less the 990 classes that it lacks here."""
    for net in NETS.values():
        assert not any(type(m).__module__.startswith("normwise") for m in net.build().modules())
    assert sum(p.numel() for p in resnet().parameters()) == 11_689_512 - 990 * 513
    assert resnet(4)(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_a_state_that_resets_is_the_same_by_an_argument_and_by_a_call_a_step() -> None:
    net = NETS["policy with resets, LSTM, 64 x 16 x 24"]
    x, begins = partial(episodes, 5, 3, 24)()
    loop, ours = net.build(), net.build()
    ours.lstm = normwise.convert(ours.lstm, to="normwise")[0]
    ours.load_state_dict(loop.state_dict())
    torch.testing.assert_close(ours(x, begins), loop(x, begins))
