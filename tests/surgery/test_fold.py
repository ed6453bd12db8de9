"""fold: outputs as before, the norm gone, and only where that is exact."""

from __future__ import annotations

import copy
import functools
import types

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import normwise
from normwise.surgery.fold import HasAxes
from support.norm_cases import randomize
from support.surgery_models import assert_same_state, net, randomized, state
from support.tolerances import assert_close

NORMS = (nn.modules.batchnorm._BatchNorm, normwise.nn.frozen_batch_norm.FrozenBatchNorm)


def assert_folded(model: nn.Module, x: Tensor, kept: int = 0, **options) -> normwise.surgery.Report:
    """To 1e-5 of the largest output, in float32; to rounding in float64."""
    model.eval()
    before = state(model)
    new, report = normwise.fold(model, **options)
    assert_same_state(model, before)
    assert sum(isinstance(m, NORMS) for m in new.modules()) == kept
    expected = model(x)
    assert (new(x) - expected).abs().max() <= 1e-5 * expected.abs().max()
    exact = copy.deepcopy(model).double()
    options = {name: value.double() if isinstance(value, Tensor) else value for name, value in options.items()}
    assert_close(normwise.fold(exact, **options).model(x.double()), exact(x.double()), kind="composed", count=100)
    return report


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("nd", [1, 2, 3])
@pytest.mark.parametrize("transposed", ["", "Transpose"])
def test_batch_norm_behind_a_convolution(transposed, nd, groups, bias):
    conv = getattr(nn, f"Conv{transposed}{nd}d")(4, 8, 3, stride=2, padding=1, groups=groups, bias=bias)
    model = nn.Sequential(conv, randomize(getattr(nn, f"BatchNorm{nd}d")(8)), nn.ReLU())
    report = assert_folded(model, torch.randn(2, 4, *(7, 6, 5)[:nd]))
    assert f"folded into nn.Conv{transposed}{nd}d 0" in str(report)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm1d(6),
        nn.BatchNorm1d(6, affine=False, eps=1e-2),
        normwise.BatchNorm1d(6, bias=False),
        normwise.FrozenBatchNorm1d(6),
        nn.SyncBatchNorm(6),
    ],
    ids=lambda norm: type(norm).__module__.split(".")[0] + "." + repr(norm),
)
def test_batch_norm_behind_and_before_a_linear_layer(norm, bias):
    model = nn.Sequential(nn.Linear(5, 6, bias=bias), randomize(norm))
    report = assert_folded(model, torch.randn(4, 5))
    assert "taken to be of rows (N, C): pass example= to be sure" in report.changed[0].note
    report = assert_folded(model, torch.randn(4, 5), example=torch.randn(2, 5))
    assert report.changed[0].note == ""
    assert_folded(nn.Sequential(norm, nn.Linear(6, 5, bias=bias)), torch.randn(4, 6))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("padding", [{"padding": 0}, {"padding": 1, "padding_mode": "reflect"}], ids=str)
def test_batch_norm_before_a_convolution_that_sees_no_zeros(padding, groups):
    model = nn.Sequential(randomize(nn.BatchNorm2d(4)), nn.Conv2d(4, 6, 3, groups=groups, bias=False, **padding))
    assert_folded(model, torch.randn(2, 4, 6, 5))


def test_padding_with_zeros_is_refused_and_would_have_been_wrong():
    model = nn.Sequential(randomize(nn.BatchNorm2d(4)), nn.Conv2d(4, 6, 3, padding="same"))
    with pytest.raises(ValueError, match="pads with zeros"):
        normwise.fold(model.eval())


def test_a_whole_model():
    """Several levels deep; the norm that is called twice stays."""
    report = assert_folded(net(), torch.randn(4, 3, 8, 8), kept=1)
    assert [skip.name for skip in report.skipped] == ["stem.1, shared"]
    assert "called 2 times" in report.skipped[0].reason
    assert {change.name for change in report.changed} == {"blocks.0.norm", "blocks.1.norm", "head.1", "head.2"}


def test_norms_around_one_convolution_and_one_behind_another():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    assert_folded(randomized(model), torch.randn(2, 3, 5, 5))


def test_an_activation_stays():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), randomize(normwise.BatchNorm2d(4, act="silu")))
    assert_folded(model, torch.randn(2, 3, 5, 5))
    assert isinstance(normwise.fold(model).model[1], nn.SiLU)


class Attention(nn.Module):
    """One norm whose result goes into three linear layers, and one whose result does not only."""

    def __init__(self, norm: nn.Module, also: nn.Module) -> None:
        super().__init__()
        self.norm, self.also = norm, also
        self.q, self.k, self.v, self.out = (nn.Linear(6, 6, bias=n % 2 == 0) for n in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        x = x + torch.softmax(self.q(y) @ self.k(y).mT, -1) @ self.v(y)
        y = self.also(x)
        return y + self.out(y)


@pytest.mark.parametrize(
    "norm",
    [
        nn.LayerNorm(6),
        normwise.LayerNorm(6),
        nn.LayerNorm(6, bias=False),
        nn.RMSNorm(6),
        normwise.RMSNorm(6),
        normwise.LayerNorm(6, offset=1.0),
        normwise.RMSNorm(6, offset=-0.5, cast="input"),
    ],
    ids=lambda norm: type(norm).__module__.split(".")[0] + "." + repr(norm),
)
def test_gain_and_bias_go_into_every_linear_layer_behind(norm):
    model = Attention(randomize(norm), randomize(nn.LayerNorm(6)))
    report = assert_folded(model, torch.randn(2, 5, 6))
    folded = normwise.fold(model).model
    assert not list(folded.norm.parameters())
    assert list(folded.also.parameters())
    assert [change.name for change in report.changed] == ["norm"]
    assert "something other" in report.skipped[0].reason
    assert "offset" not in repr(folded)


class Forward(nn.Module):
    """conv and norm, with a forward given by the test."""

    def __init__(self, forward) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), randomize(nn.BatchNorm2d(3))
        self.other = nn.Conv2d(3, 3, 1)
        self.given = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.given(self, x)


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda m, x: m.norm(y := m.conv(x)) + y, "used elsewhere too"),
        (lambda m, x: m.norm(m.conv(m.conv(x))), "nn.Conv2d is called 2 times"),
        (lambda m, x: m.norm(m.norm(m.conv(x))), "nn.BatchNorm2d is called 2 times"),
        (lambda m, x: m.norm(torch.relu(m.conv(x))), "no convolution"),
        (lambda m, x: m.norm(m.conv(x)) + m.conv.bias.sum(), "reads conv.bias by itself"),
        (lambda m, x: m.norm(m.conv(x)) * m.norm.running_var.sum(), "reads norm.running_var by itself"),
        (lambda m, x: m.conv(x), "called 0 times"),
        (lambda m, x: m.norm(m.conv(x)) if x.sum() > 0 else x, "could not follow the model's forward"),
    ],
)
def test_what_is_not_exact_is_refused(forward, reason):
    model = Forward(forward).eval()
    before = state(model)
    with pytest.raises(ValueError, match=reason):
        normwise.fold(model, inplace=True)
    assert_same_state(model, before)


def hooked(model: nn.Sequential) -> None:
    model[0].register_forward_hook(lambda module, args, out: out * 2)


def tied(model: nn.Sequential) -> None:
    model.append(nn.Conv2d(3, 3, 1))
    model[2].weight = model[0].weight


def parametrized(model: nn.Sequential) -> None:
    parametrize.register_parametrization(model[0], "weight", nn.Softplus())


def overriding(model: nn.Sequential) -> None:
    class Doubled(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model[0] = Doubled(3, 3, 1)


def training(model: nn.Sequential) -> None:
    model[1].train()


def untracked(model: nn.Sequential) -> None:
    model[1] = nn.BatchNorm2d(3, track_running_stats=False).eval()


class Inside(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return self[2](*[self[1](self[0](x)).flatten(2).mT] * 3)[0]


def inside(model: nn.Sequential) -> None:
    attention = nn.MultiheadAttention(4, 2)
    attention.odd = model[1]
    model.append(attention)
    model.__class__ = Inside


def bound(function):
    """A change that binds a forward to the norm, as accelerate's hooks do."""

    def change(model: nn.Sequential) -> None:
        model[1].forward = function(model[1])

    return change


def with_gate(model: nn.Sequential) -> None:
    class Gated(nn.BatchNorm2d):
        def __init__(self) -> None:
            super().__init__(3)
            self.gate = nn.Linear(3, 3)

    model[1] = Gated().eval()


def holding(model: nn.Sequential) -> None:
    norm = model[1]
    block = nn.Sequential(norm)
    block.forward = lambda x: norm(x)
    model[1] = block


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (inside, "called inside another layer"),
        (hooked, "has hooks"),
        (tied, "shares a parameter"),
        (parametrized, "remove_parametrizations"),
        (overriding, "a forward of its own"),
        (training, "training mode"),
        (untracked, "track_running_stats=False"),
        (bound(lambda norm: functools.partial(lambda self, x: type(self).forward(self, x) * 2, norm)), "take it off"),
        (bound(lambda norm: lambda x: x * 2), "take it off"),
        (bound(lambda norm: types.MethodType(lambda self, x: x * 2, norm)), "take it off"),
        (with_gate, r"modules of its own \(gate\)"),
        (holding, "holds the nn.BatchNorm2d by itself"),
    ],
)
def test_layers_that_something_else_depends_on_are_refused(change, reason):
    model = nn.Sequential(nn.Conv2d(3, 3, 1), randomize(nn.BatchNorm2d(3))).eval()
    change(model)
    with pytest.raises(ValueError, match=reason):
        normwise.fold(model, inplace=True)


def test_a_forward_that_is_bound_to_the_model_is_not_what_is_followed():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), randomize(nn.BatchNorm2d(3))).eval()
    model.forward = lambda x: x * 2
    with pytest.raises(ValueError, match="another one is bound to this very instance"):
        normwise.fold(model)
    model.forward = lambda x: model[1](model[0](x))
    with pytest.raises(ValueError, match="in a copy it would go on calling the original's"):
        normwise.fold(model)


class Optional(nn.Module):
    """The norm follows the convolution directly only where no scale is given."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.safe, self.safe_norm = nn.Conv2d(3, 3, 1), randomize(nn.BatchNorm2d(3))

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        y = self.conv(x)
        if scale is not None:
            y = y * scale
        return self.safe_norm(self.safe(self.norm(y)))


def test_optional_arguments_are_followed_both_ways():
    report = assert_folded(Optional(), torch.randn(2, 3, 4, 4))
    into = {change.name: change.after for change in report.changed}
    assert into["norm"].endswith("Conv2d safe")  # behind it, since before it something may stand


def test_sizes_of_an_example_are_believed_more_than_assumptions():
    """(N, L, C) with L = C: the linear layer works on the last axis, BatchNorm1d on the middle one."""
    model = nn.Sequential(nn.Linear(5, 6), randomize(nn.BatchNorm1d(6))).eval()
    with pytest.raises(ValueError, match="must have 2 axes, but has 3"):
        normwise.fold(model, torch.randn(2, 6, 5))


@pytest.mark.parametrize(
    ("model", "inputs", "same"),
    [
        # (N, L, C) and (N, H, W, C), where the norm works on axis 1.
        (nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6)), (2, 6, 5), (2, 5)),
        (nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 5)), (2, 6, 6), (2, 6)),
        (nn.Sequential(nn.Linear(5, 6), nn.SyncBatchNorm(6)), (2, 6, 4, 5), (2, 5)),
        (nn.Sequential(nn.Linear(5, 6), normwise.BatchNorm1d(6, act="relu")), (2, 6, 5), (2, 5)),
        # A convolution takes an input without a batch, a norm does not: (C, L) is to it (N, C).
        (nn.Sequential(nn.Conv1d(5, 6, 1), nn.BatchNorm1d(6)), (5, 6), (2, 5, 4)),
        (nn.Sequential(nn.BatchNorm1d(6), nn.Conv1d(6, 5, 1)), (6, 6), (2, 6, 4)),
        (nn.Sequential(nn.Conv2d(5, 6, 1), nn.SyncBatchNorm(6)), (5, 6, 3), (2, 5, 4, 3)),
        (nn.Sequential(nn.ConvTranspose1d(5, 6, 1), normwise.FrozenBatchNorm1d(6)), (5, 6), (2, 5, 4)),
    ],
)
def test_where_the_number_of_axes_is_open_the_result_is_the_models_or_an_error(model, inputs, same):
    model = randomized(model).eval()
    model(torch.randn(inputs))  # the model itself takes both
    folded = normwise.fold(model).model
    with pytest.raises(ValueError, match="for which a norm was folded here"):
        folded(torch.randn(inputs))
    x = torch.randn(same)
    assert_close(folded(x), model(x), kind="composed", count=10)
    traced = torch.fx.symbolic_trace(folded)
    assert torch.equal(traced(x), folded(x))
    with pytest.raises(ValueError, match="for which a norm was folded here"):
        traced(torch.randn(inputs))
    known = normwise.fold(model, x).model
    assert torch.equal(known(x), folded(x))
    assert not any(isinstance(module, HasAxes) for module in known.modules())
    with pytest.raises(ValueError, match="no norm that can be folded exactly"):
        normwise.fold(model, torch.randn(inputs))


def test_an_example_that_does_not_fit_is_the_models_own_error(capfd):
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6)).eval()
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        normwise.fold(model, torch.randn(7), inplace=True)
    assert isinstance(model[1], nn.BatchNorm1d)
    assert capfd.readouterr().err == ""


def test_in_place_and_where():
    model = net().eval()
    conv = model.blocks[0].conv
    same, report = normwise.fold(model, where="blocks.0.*", inplace=True)
    assert same is model
    assert model.blocks[0].conv is conv
    assert isinstance(model.blocks[0].norm, nn.Identity)
    assert isinstance(model.blocks[1].norm, nn.BatchNorm2d)
    assert len(report.changed) == 1


def test_errors_name_the_cure():
    with pytest.raises(ValueError, match=r"model.eval\(\)"):
        normwise.fold(net())
    with pytest.raises(ValueError, match="no norm that can be folded"):
        normwise.fold(nn.Sequential(nn.Linear(2, 2)).eval())
    for lone in (nn.BatchNorm1d(3), normwise.BatchNorm2d(3), nn.LayerNorm(3)):
        with pytest.raises(
            ValueError, match=r"no norm that can be folded(?s:.*)\(the model\): .*Norm.*no layer beside"
        ):
            normwise.fold(lone.eval())
    with pytest.raises(TypeError, match=r"OptimizedModule.*fold the model before it is wrapped"):
        normwise.fold(torch.compile(net(), backend="eager").eval())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_once(dtype):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), randomize(nn.BatchNorm2d(4))).eval()
    exact = normwise.fold(model.to(dtype).double()).model[0].weight
    assert torch.equal(normwise.fold(model.to(dtype)).model[0].weight, exact.to(dtype))
