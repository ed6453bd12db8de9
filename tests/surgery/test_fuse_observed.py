"""fuse where a forward cannot be followed: activations that take a norm's result in calls on an example."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import normwise
from normwise.surgery.fusing.observe import InNorm
from support.fusing import assert_same_runs, done, fused, reason

IMAGES = torch.randn(3, 4, 5, 5)


class Unfollowed(nn.Module):
    """A forward that goes by the size of its input."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.norm, self.other = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.act, self.second = nn.ReLU(inplace), nn.SiLU()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        if x.shape[0] < 1:
            return x
        return self.steps(self.conv(x))

    def steps(self, x):
        return self.second(self.other(self.conv(self.act(self.norm(x)))))


@pytest.mark.parametrize("inplace", [False, True])
def test_modules_behind_norms_are_fused_and_come_back(inplace):
    model = Unfollowed(inplace)
    new, report = fused(model, IMAGES, example=True)
    assert done(report) == {"norm": "nn.BatchNorm2d + nn.ReLU", "other": "nn.BatchNorm2d + nn.SiLU"}
    assert all("as seen on the example" in change.note for change in report.changed)
    assert (new.norm.act, new.other.act) == ("relu", "silu")
    assert type(new.act) is type(new.second) is InNorm
    assert "ReLU" in repr(new.act)
    assert_same_runs(copy.deepcopy(new), model, (IMAGES,))
    for to in ("torch", "original"):
        back, _ = normwise.convert(new, to=to)
        assert [type(m) for m in back.modules()] == [type(m) for m in model.modules()]
        assert_same_runs(back, model, (IMAGES,))
    assert type(new.act) is InNorm


def test_without_an_example_they_are_not():
    with pytest.raises(ValueError, match=r"(?s)torch\.fx cannot follow the forward of its Unfollowed"):
        normwise.fuse(Unfollowed())


def kept(self, x):
    self.last = self.norm(x)
    return self.act(self.last)


def used_by_a_function(self, x):
    y = self.norm(x)
    return self.act(y) + y.mean()


def used_before_in_place(self, x):
    y = self.norm(x)
    z = y * 2
    return self.act(y) + z


def used_by_a_layer(self, x):
    y = self.norm(x)
    return self.act(y) + self.conv(y)


def returned(self, x):
    y = self.norm(x)
    return self.act(y), y


def activation_elsewhere(self, x):
    return self.act(self.conv(self.act(self.norm(x))))


def in_training_only(self, x):
    y = self.norm(x)
    return self.act(y) if self.training else y


def a_view(self, x):
    return self.act(self.norm(x)[:])


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    "steps",
    [
        kept,
        used_by_a_function,
        used_before_in_place,
        used_by_a_layer,
        returned,
        activation_elsewhere,
        in_training_only,
        a_view,
    ],
)
def test_what_is_used_elsewhere_is_not(steps, inplace):
    class Model(Unfollowed):
        def forward(self, x):
            if x.shape[0] < 1:
                return x
            x = self.second(self.other(x))
            return steps(self, self.conv(x))

    model = Model(inplace)
    new, report = normwise.fuse(model, example=IMAGES)
    if inplace and steps in (kept, returned, used_by_a_function, used_by_a_layer):
        assert list(done(report)) == ["norm", "other"]  # the norm's result and the activation's are one tensor
    else:
        assert list(done(report)) == ["other"]
        assert "on the example" in reason(report, "norm")
        assert type(new.act) is nn.ReLU
    if steps is not kept:  # of what it keeps there is no copy
        assert_same_runs(new, model, (IMAGES,))
