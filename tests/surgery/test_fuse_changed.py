"""fuse: what a forward went by when it was followed, and what happens where that is another thing later."""

from __future__ import annotations

import copy
import enum
import gc
import pickle
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import normwise
from normwise.surgery.fusing.follow import follow, plainly_given
from support.fusing import assert_same_runs, done, fused, reason

IMAGES = torch.randn(3, 4, 5, 5)


class Size(enum.IntEnum):
    SMALL, LARGE = 1, 2


class Kind(str, enum.Enum):
    SMALL, LARGE = "small", "large"


class Way(enum.Enum):
    SMALL, LARGE = "small", "large"


DOUBLED, FACTORS, NOTHING = True, [2.0, 3.0], object()
SETTINGS = SimpleNamespace(doubled=True)


class Block(nn.Module):
    """A norm and its activation, and what a forward may go by."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()
        self.skip: nn.Module | None = nn.Conv2d(4, 4, 1)
        self.gain: nn.Parameter | None = nn.Parameter(torch.full((4, 1, 1), 3.0))
        self.register_buffer("shift", torch.full((4, 1, 1), 3.0))
        self.size, self.kind, self.way = Size.SMALL, Kind.SMALL, Way.SMALL

    def body(self, x):
        return self.relu(self.norm(self.conv(x)))


class Parts(Block):
    def forward(self, x):
        y = self.body(x)
        return y if self.skip is None else y + self.skip(x)


class Tensors(Block):
    def forward(self, x):
        y = self.body(x)
        y = y if self.gain is None else y * self.gain
        return y if self.shift is None else y + self.shift


class Classes(Block):
    def forward(self, x):
        return self.body(x) * (2 if isinstance(self.skip, nn.Conv2d) else 1)


class Absent(Block):
    def forward(self, x):
        y = self.body(x) * getattr(self, "later", 1.0)
        return y.sigmoid() if hasattr(self, "flag") else y


class Enums(Block):
    def forward(self, x):
        y = self.body(x)
        y = y * 2 if self.size is Size.SMALL else y
        y = y.tanh() if self.kind is Kind.SMALL else y
        return y.exp() if self.way is Way.SMALL else y


class Globals(Block):
    def forward(self, x):
        y = self.body(x)
        return y * FACTORS[0] if DOUBLED else y


def assign(name: str, value: Any):
    def change(block: nn.Module) -> None:
        setattr(block, name, value)

    return change


CHANGES = [
    (Parts, assign("skip", None)),
    (Tensors, assign("gain", None)),
    (Tensors, assign("shift", None)),
    (Classes, assign("skip", nn.Identity())),
    (Absent, assign("later", 3.0)),
    (Absent, assign("flag", nn.Identity())),
    (Absent, lambda block: block.register_buffer("flag", torch.zeros(1))),
    (Enums, assign("size", Size.LARGE)),
    (Enums, assign("kind", Kind.LARGE)),
    (Enums, assign("way", Way.LARGE)),
]


@pytest.mark.parametrize(("cls", "change"), CHANGES)
def test_what_is_put_in_or_taken_out_later_counts(cls, change):
    model = nn.Sequential(cls(), cls())
    new, report = fused(model, IMAGES)
    assert set(done(report)) == {"0.norm", "1.norm"}
    again = pickle.loads(pickle.dumps(new))
    for one in (model, new, again):
        change(one[0])
    assert_same_runs(new, model, (IMAGES,))
    assert_same_runs(again, model, (IMAGES,))


@pytest.mark.parametrize(("name", "value"), [("DOUBLED", False), ("FACTORS", [5.0, 3.0])])
def test_a_global_name_that_changes_later_counts(monkeypatch, name, value):
    model = Globals()
    new, report = fused(model, IMAGES)
    assert set(done(report)) == {"norm"}
    again = copy.deepcopy(new)
    monkeypatch.setattr(sys.modules[__name__], name, value)
    for one in (new, again, pickle.loads(pickle.dumps(again))):
        assert_same_runs(one, model, (IMAGES,))


def test_an_object_behind_a_global_name_is_not_followed():
    class Model(Block):
        def __init__(self) -> None:
            super().__init__()
            self.fine = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())

        def forward(self, x):
            y = self.body(self.fine(x))
            return y * 2 if SETTINGS.doubled else y

    _, report = fused(Model(), IMAGES)
    assert "goes by SETTINGS, a SimpleNamespace" in reason(report, "norm")


def test_one_graph_for_torch_compile_goes_by_all_of_it():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.Sequential(*(cls() for cls in (Parts, Tensors, Classes, Absent, Enums, Globals)))

        def forward(self, x):
            return self.parts(x)

    model = Net()
    new, report = fused(model, IMAGES)
    assert len(report.changed) == 6
    compiled = torch.compile(copy.deepcopy(new), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(IMAGES), new(IMAGES))


def test_the_default_that_marks_nothing_given_is_that_of_the_class_in_a_copy_too():
    model = nn.Sequential(Marked(), nn.Identity())
    new, _ = fused(model, IMAGES)
    for one in (copy.deepcopy(new), pickle.loads(pickle.dumps(new))):
        for block in (model[0], one[0]):
            block.twice = True  # so that the block's own forward runs
        assert_same_runs(one, model, (IMAGES,))
        model[0].twice = False


class Marked(Block):
    twice = False

    def forward(self, x, mask=NOTHING):
        y = self.body(x)
        y = y + y if self.twice else y
        return y if mask is NOTHING else y * mask


class InPlace(Block):
    def __init__(self, dtype: torch.dtype, residual_first: bool) -> None:
        super().__init__()
        self.dtype, self.residual_first = dtype, residual_first
        self.ln = nn.LayerNorm(5)

    def forward(self, x):
        y, other = self.norm(self.conv(x)), torch.cat([self.conv(x)]).to(self.dtype) * 1
        if self.residual_first:
            other += y
            y = self.relu(other)
        else:
            y += other
            y = self.relu(y)
        total = torch.mul(y, 1)
        total += x.to(self.dtype)
        return self.ln(total.float())


@pytest.mark.parametrize("residual_first", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float32])
def test_a_sum_in_place_keeps_the_dtype_of_what_it_is_written_into(dtype, residual_first):
    model = InPlace(dtype, residual_first).eval()
    new, report = normwise.fuse(model)
    assert "norm" in done(report)
    seen = []
    for one in (model, new):
        one.relu.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
        seen.append(one(IMAGES))
    assert seen[0] == seen[2]
    torch.testing.assert_close(seen[3], seen[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["from", "in"])
def test_names_that_torch_fx_cannot_write(name):
    class Model(Block):
        def __init__(self) -> None:
            super().__init__()
            self.fine = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())
            self.table = nn.ModuleDict({name: nn.BatchNorm2d(4)})

        def forward(self, x):
            return self.relu(self.table[name](self.fine(x)))

    _, report = fused(Model(), IMAGES)
    assert "cannot write down" in reason(report, f"table.{name}")


@pytest.mark.parametrize("name", ["norm", "relu"])
def test_a_forward_bound_to_a_layer_later_is_called(name):
    """As accelerate's hooks bind theirs."""
    model = Parts()
    new, _ = fused(model, IMAGES)
    for one in (model, new):
        layer = getattr(one, name)
        layer.forward = lambda x, own=layer: type(own).forward(own, x) * 3
        one.eval()
    torch.testing.assert_close(new(IMAGES), model(IMAGES))


class Starred(Block):
    def forward(self, x, *more, gain=1.0, **named):
        y = self.body(x) * gain
        for other in (*more, *named.values()):
            y = y + other
        return y


@pytest.mark.parametrize("example", [None, IMAGES])
def test_more_arguments_than_were_followed(example):
    model = Starred()
    new, report = normwise.fuse(model, example=example)
    assert set(done(report)) == {"norm"}
    assert new(IMAGES).grad_fn is not None
    for args, named in (((), {}), ((IMAGES,), {}), ((IMAGES, 2.0), {"gain": 3.0}), ((), {"other": IMAGES})):
        torch.testing.assert_close(new(IMAGES, *args, **named), model(IMAGES, *args, **named))


collections = 0


def told_of_garbage(phase: str, info: dict[str, int]) -> None:
    global collections
    collections += 1


def test_what_is_told_of_garbage_is_no_part_of_a_forward() -> None:
    """As hypothesis is, for one, from within whatever runs."""
    module, threshold = Parts(), gc.get_threshold()
    gc.callbacks.append(told_of_garbage)
    gc.set_threshold(1)
    try:
        followed = follow(module, plainly_given(module), training=True)
    finally:
        gc.set_threshold(*threshold)
        gc.callbacks.remove(told_of_garbage)
    assert collections > 0
    assert gc.isenabled()
    assert "collections" not in {read.name for read in followed.reads}
