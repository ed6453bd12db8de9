"""Where a NaN or an infinity is first met, and how large things were in the layers before."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import Tensor, nn

from normwise.diagnosis import Diagnosis, diagnose
from normwise.diagnosis.records import Finding
from normwise.diagnosis.trail import Trail

cross_entropy = nn.functional.cross_entropy


def look(model: nn.Module, loss: object = cross_entropy, x: Tensor | None = None) -> tuple[Diagnosis, Finding]:
    x = torch.randn(16, 6) if x is None else x
    found = diagnose(model, [(x, torch.randint(3, (16,)))], loss=loss)
    (finding,) = [f for f in found.findings if f.code == "NW017"]
    return found, finding


class Exp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (100 * x).exp()


def test_the_three_layers_before_it_and_their_sizes():
    names = ("a", "b", "c", "d", "exp", "head")
    layers = (nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6), Exp(), nn.Linear(6, 3))
    model = nn.Sequential()
    for name, layer in zip(names, layers, strict=True):
        model.add_module(name, layer)
    with torch.no_grad():
        model.d.weight *= 50
    x = torch.randn(16, 6)
    found, finding = look(model, x=x)
    assert finding.layer == "exp"
    sizes, y = [], x
    for name in "abcd":
        y = model.get_submodule(name)(y)
        sizes.append((name, float(y.detach().abs().max())))
    assert [(s.layer, s.size) for s in found.nonfinite.first.before] == sizes[1:]
    shown = ", ".join(f"{name} {size:.3g}" for name, size in sizes[1:])
    assert f"it gets finite numbers (the largest |x| of the outputs before: {shown})" in finding.cause
    assert Diagnosis.from_json(found.to_json()).nonfinite == found.nonfinite


def test_the_call_that_has_it_first_counts_and_not_the_layer_that_is_first_called():
    class Twice(nn.Module):
        """`first` gets what `exp` spoils at its second call."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.exp, self.head = nn.Linear(6, 6), Exp(), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.first(self.exp(5 + self.first(x))))

    _, finding = look(Twice())
    assert finding.layer == "exp"


def test_a_mask_of_infinities_in_a_pass_that_ends_well_is_no_trail():
    class Masks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.masked_fill(torch.arange(x.shape[-1]) > 2, -math.inf)

    model = nn.Sequential(nn.Linear(6, 6), Masks(), nn.Softmax(-1), nn.Linear(6, 3))
    found = diagnose(model, [(torch.randn(16, 6), torch.randint(3, (16,)))], loss=cross_entropy)
    assert found.findings == []
    assert found.nonfinite.first is None


def test_on_the_way_back_the_norms_of_the_gradients_that_arrived_before():
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return self.c(self.b(y + (0 * y).square().sqrt()))

    found, finding = look(Root())
    assert finding.layer == "a"
    assert [s.layer for s in found.nonfinite.first_gradient.before] == ["c", "b"]
    assert [s.size for s in found.nonfinite.first_gradient.before] == [
        pytest.approx(found.layer(name).gradient.output) for name in "cb"
    ]
    assert re.search(
        r"between it and 'b' \(the norms of the gradients that arrived before: c \S+, b \S+\)", finding.cause
    )


def test_a_trail_ends_at_the_first():
    trail = Trail()
    trail.add("a", 1.0)
    trail.add("b", math.inf, comes_in=True)
    trail.add("c", math.nan)
    assert (trail.first.layer, trail.first.comes_in, [s.layer for s in trail.first.before]) == ("b", True, ["a"])
