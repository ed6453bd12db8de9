"""The stream between blocks is found in models of any make, and is what hooks by hand see."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normwise.diagnosis import Diagnosis, diagnose
from normwise.measure.outliers import kurtosis

sys.path.insert(0, str(Path(__file__).parent))
from support.transformer_nets import GPT, ViT, sentences


class Branch(nn.Module):
    """x + linear(norm(x)), given and returned as somebody's library does."""

    def __init__(self, width: int = 16, out: int | None = None) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, out or width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(self.norm(x))
        return x + y if y.shape == x.shape else y


class Tupled(Branch):
    def forward(self, *, mask: Tensor | None = None, hidden_states: Tensor) -> Any:
        return super().forward(hidden_states), None


class Model(nn.Module):
    def __init__(self, blocks: nn.Module, call: Any = None, width: int = 16) -> None:
        super().__init__()
        self.blocks, self.head = blocks, nn.Linear(width, 4)
        self.call = call or (lambda blocks, x: blocks(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.call(self.blocks, x)).mean(1)


def one_by_one(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    for block in blocks:
        x = block(x)
    return x


def with_names(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    for block in blocks:
        x, _ = block(hidden_states=x, mask=None)
    return x


def found_in(model: nn.Module, features: int = 16) -> Diagnosis:
    data = [(torch.randn(8, 11, features), torch.randint(4, (8,))) for _ in range(2)]
    return diagnose(model, data, loss=F.cross_entropy)


@pytest.mark.parametrize(
    ("make", "blocks"),
    [
        (lambda: Model(nn.ModuleList([Branch() for _ in range(4)]), one_by_one), [0, 1, 2, 3]),
        (lambda: Model(nn.ModuleList([Tupled() for _ in range(3)]), with_names), [0, 1, 2]),
        (lambda: Model(nn.Sequential(*(Branch() for _ in range(5)))), [0, 1, 2, 3, 4]),
        # A stem of another width, and layers that are no blocks, stand outside.
        (lambda: Model(nn.Sequential(Branch(16, 24), *(Branch(24) for _ in range(3))), width=24), [1, 2, 3]),
        (lambda: Model(nn.Sequential(nn.Linear(16, 16), Branch(), Branch(), Branch(), nn.Dropout())), [1, 2, 3]),
        # The longer of two runs.
        (lambda: Model(nn.Sequential(*(Branch(a, b) for a, b in SIZES)), width=32), [4, 5, 6, 7]),
    ],
    ids=["list", "tuples", "sequential", "stem", "other layers", "two widths"],
)
def test_chains_of_blocks(make, blocks):
    (stream,) = found_in(make()).streams
    assert stream.layer == "blocks"
    assert stream.blocks == [f"blocks.{n}" for n in blocks]
    assert len(stream.points) == len(blocks) + 1


def test_a_chain_inside_a_block_is_a_part_of_it():
    """T5's blocks are lists of three layers each."""
    found = found_in(Model(nn.Sequential(*(nn.Sequential(Branch(), Branch(), Branch()) for _ in range(4)))))
    (stream,) = found.streams
    assert stream.blocks == [f"blocks.{n}" for n in range(4)]
    assert all(point.median > 0 for point in stream.points)


def test_two_stacks_are_two_streams_in_the_order_of_their_calls():
    second, first = (nn.Sequential(*(Branch() for _ in range(count))) for count in (3, 4))
    model = Model(nn.ModuleDict({"second": second, "first": first}))
    model.call = lambda both, x: both["second"](both["first"](x))
    assert [(s.layer, len(s.blocks)) for s in found_in(model).streams] == [("blocks.first", 4), ("blocks.second", 3)]
    assert all(point.median > 0 for stream in found_in(model).streams for point in stream.points)


SIZES = [(16, 16), (16, 16), (16, 16), (16, 32), (32, 32), (32, 32), (32, 32), (32, 32)]


class Convolutions(nn.Module):
    """A residual block over (N, C, L)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(11, 11, 3, padding=1), nn.BatchNorm1d(11)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv(x))


def twice(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    return one_by_one(blocks, one_by_one(blocks, x))


@pytest.mark.parametrize(
    "model",
    [
        Model(nn.Sequential(*(Convolutions() for _ in range(4)))),
        Model(nn.ModuleList([Branch() for _ in range(4)]), twice),
        Model(nn.Sequential(Branch(), Branch())),
        Model(nn.Sequential(*(nn.Linear(16, 16) for _ in range(4)))),
        Model(
            nn.ModuleList([Branch() for _ in range(4)]),
            lambda blocks, x: sum(block(x[:, 0]) for block in blocks)[:, None],
        ),
        Model(nn.ModuleList([Branch() for _ in range(4)]), lambda blocks, x: blocks[0](x)),
    ],
    ids=["channels first", "called twice", "two", "layers", "two axes", "never called"],
)
def test_what_is_no_stream_of_tokens(model):
    assert found_in(model).streams == []


def test_the_numbers_are_those_of_hooks_by_hand():
    model, data = GPT(blocks=3), sentences(count=2)
    found = diagnose(model, data, loss=F.cross_entropy)
    outputs: dict[str, list[Tensor]] = {}
    for name, block in model.blocks.named_children():
        block.register_forward_hook(lambda m, a, y, name=name: outputs.setdefault(name, []).append(y.detach().double()))
    first: list[Tensor] = []
    model.blocks[0].register_forward_pre_hook(lambda m, a: first.append(a[0].detach().double()))
    for tokens, _ in data:
        model(tokens)
    (stream,) = found.streams
    assert (stream.features, stream.blocks) == (32, ["blocks.0", "blocks.1", "blocks.2"])
    for point, ys in zip(stream.points, [first, *outputs.values()], strict=True):
        y = torch.cat(ys).flatten(0, 1)
        squares = y.square().mean(0)
        assert point.kurtosis == pytest.approx(kurtosis(squares), rel=1e-5)
        assert point.peak == pytest.approx(float(y.abs().max()), rel=1e-5)
        assert point.median == pytest.approx(float(squares.sqrt().median()), rel=1e-5)
        medians = [float(t.square().mean(2).sqrt().median()) for t in ys]
        assert point.size == pytest.approx(sum(medians) / 2, rel=1e-5)
        assert point.outliers == []


def test_streams_and_attention_survive_json():
    found = diagnose(ViT(), [(torch.randn(8, 3, 12, 12), torch.randint(4, (8,)))], loss=F.cross_entropy)
    again = Diagnosis.from_json(found.to_json())
    assert again.streams == found.streams
    assert again.attention == found.attention
    assert len(found.streams) == 1
    assert len(found.attention) == 4


@pytest.mark.parametrize(("growth", "raised"), [(1.0, False), (1.2, False), (1.5, True), (3.0, True)])
def test_growth_from_block_to_block(growth, raised):
    """A jump of one block, as of massive activations, and a slow growth are none."""

    class Grows(Branch):
        def forward(self, x: Tensor) -> Tensor:
            return growth * x + 0.0 * super().forward(x)

    found = found_in(Model(nn.Sequential(*(Grows() for _ in range(12)))))
    assert ("NW019" in {f.code for f in found.findings}) == raised


def test_one_block_that_jumps_is_no_exponential_growth():
    class Jumps(Branch):
        def forward(self, x: Tensor) -> Tensor:
            return 500 * super().forward(x)

    blocks = [Branch() for _ in range(3)] + [Jumps()] + [Branch() for _ in range(6)]
    found = found_in(Model(nn.Sequential(*blocks)))
    assert found.streams[0].points[-1].size > 100 * found.streams[0].points[1].size
    assert "NW019" not in {f.code for f in found.findings}
