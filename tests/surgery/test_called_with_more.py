"""Norms that are called with segments, a domain, scale and shift or a gate: a successor takes these too, or none comes;
and RunningNorm, whose statistics no other norm has."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import normwise
from support.called_with_more import (
    FEATURES,
    Net,
    Normed,
    domain,
    gate,
    of_conditions,
    of_domains,
    of_segments,
    scale_and_shift,
    segments,
    trained,
)

CONDITIONAL = lambda: Net(normwise.BatchNorm1d(FEATURES), scale_and_shift)  # noqa: E731
SEGMENTED = lambda: Net(normwise.BatchNorm1d(FEATURES), segments)  # noqa: E731
REFUSED: list[tuple[Any, Any, str, str]] = [
    (CONDITIONAL, of_conditions, "torch", r"it is called with scale=, shift=, which nn.BatchNorm1d does not take"),
    (SEGMENTED, of_segments, "torch", "it is called with segments=, which nn.BatchNorm1d does not take"),
    (SEGMENTED, of_segments, "group", "it is called with segments=, which normwise.GroupNorm does not take"),
    (SEGMENTED, of_segments, "renorm", "it is called with segments=, which normwise.BatchRenorm1d does not take"),
    (SEGMENTED, of_segments, "layer", r"segments=.* takes the last axis, without dim=: put .*LayerNorm\(\(16,\)\)"),
    (
        lambda: Net(normwise.RMSNorm(FEATURES), gate),
        of_conditions,
        "torch",
        "it is called with gate=, which nn.RMSNorm does not take",
    ),
    (
        lambda: Net(normwise.BatchNorm1d(FEATURES, act="relu"), scale_and_shift),
        of_conditions,
        "torch",
        "which nn.BatchNorm1d, with what follows it, does not take",
    ),
    (
        lambda: Net(normwise.BatchNorm1d(FEATURES, domains=2), domain),
        of_domains,
        "torch",
        "statistics of 2 domains, of which its successor could take one",
    ),
]


@pytest.mark.parametrize(("make", "data", "to", "why"), REFUSED)
def test_no_successor_that_does_not_take_them(make: Any, data: Any, to: Any, why: str) -> None:
    """An example shows what a norm is called with."""
    net = make()
    with pytest.raises(ValueError, match=why):
        normwise.convert(net, to=to, example=data()[0][0])


@pytest.mark.parametrize("to", ["layer", "group", "frozen", "renorm"])
def test_a_successor_that_takes_scale_and_shift(to: Any) -> None:
    data = of_conditions()
    net = trained(CONDITIONAL(), data).eval()
    converted, _ = normwise.convert(net, to=to, example=data[0][0])
    y = converted.eval()(*data[0][0])
    assert y.isfinite().all()
    if to == "frozen":
        torch.testing.assert_close(y, net(*data[0][0]))


def test_recalibrating_takes_no_notice_of_scale_and_shift() -> None:
    """Statistics are those of the bare input of the norm, whatever follows."""
    data = of_conditions()
    net = trained(CONDITIONAL(), data)
    normwise.recalibrate(net, data)
    values = torch.cat([net.first(x) for (x, _), _ in data])
    torch.testing.assert_close(net.norm.running_mean, values.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(net.norm.running_var, values.var(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mixed", [False, True], ids=["one domain a batch", "mixed"])
def test_recalibrating_gives_each_domain_its_own_statistics(mixed: bool) -> None:
    data = of_domains(mixed)
    net = trained(Net(normwise.BatchNorm1d(FEATURES, domains=2), domain), data)
    normwise.recalibrate(net, data)
    for k in range(2):
        rows = [net.first(x)[torch.as_tensor(d).expand(len(x)) == k] for (x, d), _ in data]
        torch.testing.assert_close(net.norm.running_mean[k], torch.cat(rows).mean(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(net.norm.running_var[k], torch.cat(rows).var(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "data"),
    [
        (CONDITIONAL, of_conditions),
        (SEGMENTED, of_segments),
        (lambda: Net(normwise.BatchNorm1d(FEATURES, domains=2), domain), of_domains),
    ],
    ids=["scale and shift", "segments", "domains"],
)
def test_frozen_statistics_stay(make: Any, data: Any) -> None:
    given = data()
    net = trained(make(), given)
    expected = net.eval()(*given[0][0])
    normwise.freeze(net)
    net.train()
    torch.testing.assert_close(net(*given[0][0]), expected)
    before = copy.deepcopy(dict(net.named_buffers()))
    net(*given[1][0])
    assert all(torch.equal(t, before[name]) for name, t in net.named_buffers())


@pytest.mark.parametrize(
    ("make", "data"),
    [
        (CONDITIONAL, of_conditions),
        (SEGMENTED, of_segments),
        (lambda: Net(normwise.LayerNorm(FEATURES), scale_and_shift), of_conditions),
    ],
    ids=["batch norm", "segments", "layer norm"],
)
def test_folding_is_refused(make: Any, data: Any) -> None:
    with pytest.raises(ValueError, match="is called with more than its input"):
        normwise.fold(make().eval(), example=data()[0][0])


def test_a_running_norm_is_frozen_and_woken() -> None:
    net, x = Normed(affine=True), torch.randn(20, 8)
    net(3 * x + 1)
    report = normwise.freeze(net)
    assert [change.name for change in report.changed] == ["norm"]
    assert normwise.frozen(net) == ["norm"]
    net.train()
    mean = net.norm.mean.clone()
    net(x)
    assert torch.equal(net.norm.mean, mean)
    assert not net.norm.weight.requires_grad
    normwise.unfreeze(net)
    net(x)
    assert not torch.equal(net.norm.mean, mean)
    assert net.norm.weight.requires_grad


def test_a_running_norm_says_why_it_is_not_frozen_or_recalibrated() -> None:
    with pytest.raises(ValueError, match="RunningNorm: per_instance=True: it has no running statistics"):
        normwise.freeze(Normed(per_instance=True))
    with pytest.raises(ValueError, match=r"those of all that it has seen: reset_running_stats\(\) and then update"):
        normwise.recalibrate(Normed(), [torch.randn(4, 8)])


def test_a_recurrent_layer_that_is_told_its_lengths() -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = normwise.LSTM(4, 6, norm=None, batch_first=True)

        def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
            return self.rnn(x, lengths=lengths)[0]  # type: ignore[no-any-return]

    with pytest.raises(ValueError, match=r"called with lengths=, which nn\.LSTM does not take"):
        normwise.convert(Tagger(), to="torch", example=(torch.randn(2, 5, 4), torch.tensor([5, 3])))
