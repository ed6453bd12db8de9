"""Layers of classes that convert does not know: what is theirs is carried, or refused by name, and never mistaken."""

from __future__ import annotations

import copy
import functools
import types

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normwise
from support.norm_cases import randomize
from support.surgery_models import assert_same_state, state
from support.tolerances import assert_close

# Arguments of the new layers, by which a user's class calls something else.
FOREIGN = {
    "dim": 1,
    "act": "relu",
    "bias": None,
    "process_group": "data",
    "mask": True,
    "r_max": 0.5,
    "virtual_batch_size": 1,
    "spatial": 7,
    "num_groups": 5,
}


@pytest.mark.parametrize("to", ["normwise", "batch", "layer", "group", "renorm", "frozen", "sync"])
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda base: base(nn.BatchNorm2d)(4), (2, 4, 3, 3)),
        (lambda base: base(nn.LayerNorm)(4), (2, 4, 4)),
        (lambda base: base(nn.RMSNorm)(4), (2, 4, 4)),
        (lambda base: base(nn.GroupNorm)(2, 4), (2, 4, 3)),
        (lambda base: base(nn.InstanceNorm2d)(4, affine=True), (2, 4, 3, 3)),
        (lambda base: base(normwise.BatchNorm2d)(4, act="silu"), (2, 4, 3, 3)),
        (lambda base: base(normwise.LayerNorm)(4), (2, 4, 4)),
    ],
)
def test_only_arguments_of_classes_that_are_known_are_read(make, shape, to):
    """With attributes of such names the result is the one without them."""

    def plain(base):
        return type("Derived", (base,), {})

    torch.manual_seed(1)
    layer = make(plain)
    derived = copy.deepcopy(layer)
    known = {name for base in type(layer).__mro__ if base.__module__[:5] in ("torch", "normw") for name in vars(base)}
    for name, value in FOREIGN.items():
        if name not in known and not hasattr(layer, name):
            setattr(derived, name, value)
    x = torch.randn(shape)

    def converted(layer: nn.Module) -> Tensor | str:
        try:
            return normwise.convert(nn.Sequential(layer).eval(), to=to).model(x)
        except ValueError as error:
            return str(error)

    expected, actual = converted(layer), converted(derived)
    assert torch.equal(actual, expected) if isinstance(expected, Tensor) else actual == expected


def test_there_is_no_axis_in_a_width_that_is_called_dim():
    class Norm(nn.LayerNorm):
        def __init__(self, features: int) -> None:
            super().__init__(features)
            self.dim = 1

    layer, x = randomize(Norm(4)), torch.randn(2, 4, 4)
    new, _ = normwise.convert(nn.Sequential(layer), to="normwise")
    assert_close(new(x), layer(x), count=4)
    with pytest.raises(ValueError, match="normalizes the last axes"):
        normwise.convert(nn.Sequential(layer), to="group")
    model = nn.Sequential(layer, nn.Linear(4, 3)).eval()
    assert_close(normwise.fold(model).model(x), model(x), kind="composed", count=4)


class BySuper(nn.BatchNorm2d):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Dropout(0.0), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


class WrittenOut(nn.BatchNorm2d):
    """As timm's BatchNormAct2d."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.ndim == 4, f"expected 4D input (got {x.ndim}D input)")
        factor = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        by_batch = True if self.training else self.running_mean is None and self.running_var is None
        tracked = not self.training or self.track_running_stats
        x = F.batch_norm(
            x,
            self.running_mean if tracked else None,
            self.running_var if tracked else None,
            self.weight,
            self.bias,
            by_batch,
            factor,
            self.eps,
        )
        return self.act(self.drop(x))


class GroupNormAct(nn.GroupNorm):
    def __init__(self, channels: int) -> None:
        super().__init__(2, channels)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps))


class OfOurs(normwise.BatchNorm2d):
    def __init__(self, channels: int) -> None:
        super().__init__(channels, act="relu")
        self.scale = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale(super().forward(x))


@pytest.mark.parametrize("to", ["normwise", "torch"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("build", [BySuper, WrittenOut, GroupNormAct, OfOurs])
def test_modules_that_are_called_behind_the_base_follow_the_new_layer(build, training, to):
    model = nn.Sequential(randomize(build(4)), nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3), normwise.BatchNorm2d(3))
    model.train(training)
    behind = list(model[0].children())
    x = torch.randn(5, 4, 6, 6)
    new, report = normwise.convert(model, to=to)
    if isinstance(model[0], normwise.BatchNorm2d) == (to == "normwise"):
        assert "is one already" in report.skipped[0].reason
        return
    assert [type(module) for module in new[0]][-len(behind) :] == [type(module) for module in behind]
    assert "follow" in report.changed[0].note
    assert_close(new(x), model(x), kind="composed", count=100)
    for name in ("running_mean", "running_var") if isinstance(model[0], nn.BatchNorm2d) else ():
        assert_close(new[0][0].get_buffer(name), model[0].get_buffer(name), count=180)


def test_each_of_these_modules_keeps_its_mode():
    layer = BySuper(4)
    layer.drop.eval()
    new = normwise.convert(nn.Sequential(layer), to="normwise").model[0]
    assert [new.training, new[0].training, new[1].training, new[2].training] == [True, True, False, True]


class Gated(nn.BatchNorm2d):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.gate = nn.Conv2d(channels, channels, 1)


class Multiplied(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.gate(x).sigmoid()


class Before(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.gate(x))


class Sometimes(Gated):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return self.gate(y) if self.training else y


class Doubled(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return self.gate(super().forward(x) * 2)


class OtherEps(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return self.gate(
            F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, 0.5)
        )


class Swapped(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return self.gate(
            F.batch_norm(x, self.running_mean, self.running_var, self.bias, self.weight, self.training, 0.1, self.eps)
        )


class Moved(Gated):
    def forward(self, x: Tensor) -> Tensor:
        self.running_mean.mul_(0.5)
        return self.gate(super().forward(x))


class Values(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return self.gate(super().forward(x)) if x.sum() > 0 else super().forward(x)


@pytest.mark.parametrize("subclasses", [False, True])
@pytest.mark.parametrize(
    "build", [Multiplied, Before, Sometimes, Doubled, OtherEps, Swapped, Moved, Values], ids=lambda cls: cls.__name__
)
def test_any_other_use_of_them_is_refused_by_name(build, subclasses):
    model = nn.Sequential(randomize(build(4)), nn.BatchNorm2d(4))
    before = state(model)
    new, report = normwise.convert(model, to="normwise", subclasses=subclasses)
    assert type(new[0]) is build
    assert "modules of its own (gate)" in report.skipped[0].reason
    assert type(new[1]) is normwise.BatchNorm2d
    assert_same_state(model, before)


def test_modules_that_the_forward_does_not_call_stay_where_others_look_for_them():
    new, report = normwise.convert(nn.Sequential(Gated(4)), to="normwise")
    assert isinstance(new[0].gate, nn.Conv2d)
    assert "its own gate carried" in report.changed[0].note
    assert new.state_dict().keys() == nn.Sequential(Gated(4)).state_dict().keys()

    class Named(nn.BatchNorm2d):
        def __init__(self, channels: int) -> None:
            super().__init__(channels)
            self.act = nn.ReLU()

    with pytest.raises(ValueError, match="a module of its own, act, which has no place"):
        normwise.convert(nn.Sequential(Named(4)), to="normwise")


def bound_forwards():
    """Forwards of the instance, each of which doubles what the layer computes."""
    return {
        "partial": lambda layer: functools.partial(lambda self, x: type(self).forward(self, x) * 2, layer),
        "lambda": lambda layer: lambda x: type(layer).forward(layer, x) * 2,
        "method": lambda layer: types.MethodType(lambda self, x: type(self).forward(self, x) * 2, layer),
    }


@pytest.mark.parametrize("way", bound_forwards())
@pytest.mark.parametrize("build", [lambda: nn.BatchNorm1d(4), lambda: nn.LayerNorm(4), lambda: normwise.BatchNorm1d(4)])
@pytest.mark.parametrize("to", ["normwise", "torch", "layer"])
def test_a_layer_with_a_forward_of_the_instance_stays(way, build, to):
    model = nn.Sequential(nn.Linear(3, 4), build(), nn.BatchNorm1d(4), normwise.BatchNorm1d(4)).eval()
    model[1].forward = bound_forwards()[way](model[1])
    layer, x = model[1], torch.randn(5, 3)
    expected = model(x)
    if way == "lambda":  # which a copy shares with the original, and with it the layer that it calls
        with pytest.raises(ValueError, match="would go on calling the original's"):
            normwise.convert(model, to=to)
    else:
        new, report = normwise.convert(model, to=to)
        assert "bound to this very instance" in report.skipped[0].reason
        assert type(new[1]) is type(layer)
        if to != "layer":
            assert_close(new(x), expected, kind="composed", count=10)
    same, report = normwise.convert(model, to=to, inplace=True)
    assert same[1] is layer
    assert "bound to this very instance" in report.skipped[0].reason
    if to != "layer":
        assert_close(same(x), expected, kind="composed", count=10)


def test_a_block_whose_forward_holds_the_layer_keeps_it():
    """The new layer would stand where nobody calls it."""
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), nn.BatchNorm1d(4))
    block, norm = model[0], model[0][1]
    block.forward = lambda x: norm(block[0](x))
    same, report = normwise.convert(model, to="normwise", inplace=True)
    assert same[0][1] is norm
    assert "the forward that is bound to 0 holds it" in report.skipped[0].reason
    assert type(same[1]) is normwise.BatchNorm1d


def test_a_block_with_a_forward_that_a_copy_takes_along_is_converted():
    """accelerate's hooks are of this kind: the module is an argument, and its layers are looked up in it."""
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    block = model[0]
    block._old_forward = block.forward
    block.forward = functools.partial(lambda self, x: self._old_forward(x) * 2, block)
    model.eval()
    x = torch.randn(5, 3)
    new, _ = normwise.convert(model, to="normwise")
    assert type(new[0][1]) is normwise.BatchNorm1d
    assert_close(new(x), model(x), kind="composed", count=10)
    new[0][1].bias.data += 1
    assert (new(x) - model(x) - 2).abs().max() < 1e-5


def test_what_was_compiled_by_itself_is_said():
    model = nn.Sequential(nn.BatchNorm1d(4))
    model[0].compile(backend="eager")
    assert "compile()" in normwise.convert(model, to="normwise", inplace=True).report.changed[0].note


class OfRows(nn.BatchNorm1d):
    """Of (N, L, C), which a hook on the layer takes for (N, C, L)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mT).mT


class Clipped(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-1, 1)


def test_statistics_are_taken_of_what_is_normalized():
    x = torch.randn(5, 4, 4) * torch.arange(1.0, 5.0)
    for build in (Clipped, nn.BatchNorm1d):
        model = nn.Sequential(build(4))
        normwise.recalibrate(model, [x])
        assert_close(model[0].running_mean, x.mean((0, 2)), count=20)
    with pytest.raises(ValueError, match="OfRows: it has a forward of its own, which may give BatchNorm1d's"):
        normwise.recalibrate(nn.Sequential(OfRows(4)), [x])
    for bind in bound_forwards().values():
        model = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4))
        model[0].forward = bind(model[0])
        report = normwise.recalibrate(model, [x])
        assert "bound to the instance" in report.skipped[0].reason
        assert [change.name for change in report.changed] == ["1"]
