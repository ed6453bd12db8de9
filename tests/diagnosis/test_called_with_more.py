"""Norms called with segments, a domain, scale and shift, a gate or a residual: right findings, and no false ones."""

from __future__ import annotations

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

HEALTHY = {
    "conditional layer norm": (lambda: Net(normwise.LayerNorm(FEATURES), scale_and_shift), of_conditions),
    "conditional layer norm without its own gain": (
        lambda: Net(normwise.LayerNorm(FEATURES, elementwise_affine=False), scale_and_shift),
        of_conditions,
    ),
    "conditional group norm": (lambda: Net(normwise.GroupNorm(2, FEATURES), scale_and_shift), of_conditions),
    "conditional batch norm": (lambda: Net(normwise.BatchNorm1d(FEATURES), scale_and_shift, bias=False), of_conditions),
    "gated": (lambda: Net(normwise.RMSNorm(FEATURES), gate), of_conditions),
    "gate first": (lambda: Net(normwise.RMSNorm(FEATURES, gate_first=True), gate), of_conditions),
    "batch norm of segments": (lambda: Net(normwise.BatchNorm1d(FEATURES), segments, bias=False), of_segments),
    "instance norm of segments": (lambda: Net(normwise.InstanceNorm1d(FEATURES), segments, bias=False), of_segments),
    "layer norm of segments": (lambda: Net(normwise.LayerNorm(FEATURES), segments), of_segments),
    "domains": (lambda: Net(normwise.BatchNorm1d(FEATURES, domains=2), domain, bias=False), of_domains),
    "mixed domains": (
        lambda: Net(normwise.BatchNorm1d(FEATURES, domains=2), domain, bias=False),
        lambda: of_domains(mixed=True),
    ),
}


def diagnosed(net: nn.Module, data: list[Any]) -> normwise.diagnosis.records.Diagnosis:
    return normwise.diagnose(net, data, loss=nn.functional.cross_entropy)


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_one_raises_nothing(name: str) -> None:
    make, data = HEALTHY[name]
    found = diagnosed(trained(make(), data()), data())
    assert found.findings == []
    assert found.notes == []


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_segments_of_few_rows_are_few_values(norm: str) -> None:
    """However many rows a batch has; and what cures it takes segments."""
    cls = normwise.BatchNorm1d if norm == "batch" else normwise.InstanceNorm1d
    data = of_segments(rows=2)
    found = diagnosed(trained(Net(cls(FEATURES), segments, bias=False), data), data)
    assert [finding.code for finding in found.findings] == ["NW001"]
    record = next(layer.norm for layer in found.layers if layer.name == "norm")
    assert record is not None
    assert (record.values, record.samples, record.segments) == (2, 2, True)
    assert "LayerNorm with segments=" in found.findings[0].cure


def test_masked_rows_of_a_segment_do_not_count() -> None:
    def with_mask(net: Net, numbers: torch.Tensor) -> dict[str, Any]:
        return {"segments": numbers, "mask": torch.arange(len(numbers)) % 2 == 0}

    data = of_segments(rows=8)
    found = diagnosed(Net(normwise.BatchNorm1d(FEATURES), with_mask, bias=False), data)
    assert next(layer.norm.values for layer in found.layers if layer.name == "norm") == 4


@pytest.mark.parametrize("by", ["segments", "gate_first"])
def test_of_other_numbers_than_the_input_nothing_is_said(by: str) -> None:
    """What is squared is of a segment, or of the input times the gate: no largest number, no rounding of a row."""
    net = (
        Net(normwise.LayerNorm(FEATURES), segments)
        if by == "segments"
        else Net(normwise.LayerNorm(FEATURES, gate_first=True), gate)
    )
    nn.init.zeros_(net.first.weight)
    nn.init.constant_(net.first.bias, 1e5)
    found = diagnosed(net, of_segments() if by == "segments" else of_conditions())
    record = next(layer.norm for layer in found.layers if layer.name == "norm")
    assert record is not None
    assert record.largest is None
    assert record.noise == 0


def test_the_largest_number_is_that_of_the_sum_with_a_residual() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.last = normwise.RMSNorm(FEATURES), nn.Linear(FEATURES, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.last(self.norm(x, add=torch.full_like(x, 1000.0))[0])
            return y

    data = [(torch.rand(8, FEATURES), torch.randint(3, (8,)))]
    found = diagnosed(Residual(), data)
    assert 1000 < next(layer.norm.largest for layer in found.layers if layer.name == "norm") < 1001


def test_a_running_norm_is_no_unknown_layer() -> None:
    data = [(torch.randn(16, 8), torch.randint(3, (16,))) for _ in range(3)]
    assert diagnosed(Normed(), data).notes == []
