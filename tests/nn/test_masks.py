"""Padded equals unpadded: outputs, gradients and running statistics do not feel the padding, whatever it holds."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import normwise
from support.norm_cases import randomize
from support.tolerances import assert_close

CHANNELS, STEPS = 6, 5

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm1d": lambda: normwise.BatchNorm1d(CHANNELS),
    "BatchNorm1d cumulative": lambda: normwise.BatchNorm1d(CHANNELS, momentum=None),
    "InstanceNorm1d": lambda: normwise.InstanceNorm1d(CHANNELS, affine=True),
    "GroupNorm": lambda: normwise.GroupNorm(2, CHANNELS),
    "LayerNorm over channels": lambda: normwise.LayerNorm(CHANNELS, dim=1),
    "RMSNorm over channels": lambda: normwise.RMSNorm(CHANNELS, dim=1),
}
# Layers whose statistics do not run over samples: each sample can be had alone and unpadded.
PER_SAMPLE = [name for name in LAYERS if not name.startswith("BatchNorm")]
each_layer = pytest.mark.parametrize("name", LAYERS)


def double(name: str) -> nn.Module:
    return randomize(LAYERS[name]().double())


def poisoned(x: Tensor, valid: Tensor) -> Tensor:
    return x.masked_fill(~valid, math.nan)


def random_lengths(draw_zero: bool = True) -> Tensor:
    """Random ones, with 0 and the full length among them."""
    return torch.cat([torch.tensor([0, STEPS] if draw_zero else [STEPS]), torch.randint(1, STEPS + 1, (4,))])


def differentiate(layer: nn.Module, x: Tensor, upstream: Tensor, **kwargs: Tensor) -> tuple[Tensor, list[Tensor]]:
    leaf = x.clone().requires_grad_()
    y = layer(leaf, **kwargs)
    return y.detach(), list(torch.autograd.grad(y, [leaf, *layer.parameters()], upstream))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("how", ["lengths", "mask", "full mask"])
@pytest.mark.parametrize("name", ["BatchNorm1d", "BatchNorm1d cumulative"])
def test_batch_norm_padded_equals_rows(name: str, how: str, training: bool) -> None:
    """The truth: all valid steps as rows of one unpadded (rows, C) batch of torch.nn.BatchNorm1d."""
    layer = double(name).train(training)
    torch_layer = nn.BatchNorm1d(CHANNELS, momentum=layer.momentum, dtype=torch.float64).train(training)
    torch_layer.load_state_dict(layer.state_dict())
    for _ in range(2):
        lengths = random_lengths()
        x = torch.randn(len(lengths), CHANNELS, STEPS, dtype=torch.float64)
        valid = torch.arange(STEPS) < lengths[:, None]
        upstream = torch.randn_like(x)
        kwargs = {
            "lengths": {"lengths": lengths},
            "mask": {"mask": valid},
            "full mask": {"mask": valid[:, None].expand_as(x)},
        }[how]
        y, grads = differentiate(layer, poisoned(x, valid[:, None]), upstream, **kwargs)
        rows, row_grads = differentiate(torch_layer, x.mT[valid], upstream.mT[valid])
        assert_close(y.mT[valid], rows)
        assert_close(grads[0].mT[valid], row_grads[0], kind="grad")
        for got, truth in zip(grads[1:], row_grads[1:], strict=True):
            assert_close(got, truth, kind="grad")
        assert not y.mT[~valid].any()
        assert not grads[0].mT[~valid].any()
        for key, truth in torch_layer.state_dict().items():
            assert_close(layer.state_dict()[key].double(), truth, name=key)


@pytest.mark.parametrize("name", PER_SAMPLE)
@pytest.mark.parametrize("how", ["lengths", "mask"])
def test_sample_by_sample_equals_padded(name: str, how: str) -> None:
    layer = double(name)
    lengths = random_lengths()
    x = torch.randn(len(lengths), CHANNELS, STEPS, dtype=torch.float64)
    valid = torch.arange(STEPS) < lengths[:, None]
    upstream = torch.randn_like(x)
    kwargs = {"lengths": lengths} if how == "lengths" else {"mask": valid}
    y, grads = differentiate(layer, poisoned(x, valid[:, None]), upstream, **kwargs)
    total = [torch.zeros_like(p) for p in layer.parameters()]
    for i, n in enumerate(lengths.tolist()):
        assert not y[i, :, n:].any()
        assert not grads[0][i, :, n:].any()
        if n == 0 or (n == 1 and name == "InstanceNorm1d"):
            continue  # nothing to compare; a single position alone is refused
        alone, alone_grads = differentiate(layer, x[i : i + 1, :, :n], upstream[i : i + 1, :, :n])
        assert_close(y[i, :, :n], alone[0])
        assert_close(grads[0][i, :, :n], alone_grads[0][0], kind="grad")
        total = [t + g for t, g in zip(total, alone_grads[1:], strict=True)]
    if name == "InstanceNorm1d":  # a single valid position standardizes to 0 and so gives the bias
        singles = (lengths == 1).nonzero().flatten().tolist()
        for i in singles:
            assert_close(y[i, :, 0], layer.bias)
            total[1] = total[1] + upstream[i, :, 0]
    for got, truth in zip(grads[1:], total, strict=True):
        assert_close(got, truth, kind="grad", scale=10.0)


def test_tracked_instance_norm_leaves_padding_out_of_its_averages() -> None:
    layer = normwise.InstanceNorm1d(2, track_running_stats=True, momentum=0.5, dtype=torch.float64)
    x = torch.tensor(
        [[[1.0, 3.0, math.nan], [2.0, 6.0, math.nan]], [[9.0, math.inf, 9.0], [4.0, math.inf, 9.0]]]
    ).double()
    layer(x, lengths=torch.tensor([2, 0]))
    assert layer.running_mean.tolist() == [1.0, 2.0]  # half way from 0 to the means 2 and 4
    assert layer.running_var.tolist() == [1.5, 4.5]  # half way from 1 to the unbiased variances 2 and 8
    layer(x, lengths=torch.tensor([0, 1]))  # one element has a mean and no deviation
    assert layer.running_mean.tolist() == [5.0, 3.0]
    assert layer.running_var.tolist() == [1.5, 4.5]


@pytest.mark.parametrize("norm", [normwise.LayerNorm, normwise.RMSNorm])
@pytest.mark.parametrize("shape", [(CHANNELS,), (STEPS, CHANNELS)], ids=str)
def test_trailing_features_with_a_mask_of_steps(norm: type[nn.Module], shape: tuple[int, ...]) -> None:
    """(N, L, D): each token alone, or a whole sample whose padding is left out of the statistics."""
    layer = randomize(norm(shape, dtype=torch.float64))
    x = torch.randn(4, STEPS, CHANNELS, dtype=torch.float64)
    valid = torch.arange(STEPS) < torch.tensor([0, 2, STEPS, 1])[:, None]
    upstream = torch.randn_like(x)
    y, grads = differentiate(layer, poisoned(x, valid[..., None]), upstream, mask=valid)
    leaf = x.clone().requires_grad_()
    gain = layer.weight
    for i, n in enumerate(valid.sum(1).tolist()):
        part = leaf[i, :n]
        dims = (-1,) if len(shape) == 1 else (-2, -1)
        centred = part - part.mean(dims, keepdim=True) if norm is normwise.LayerNorm else part
        eps = layer.eps or torch.finfo(torch.float64).eps
        z = centred / (centred.square().mean(dims, keepdim=True) + eps).sqrt()
        truth = z * (gain if len(shape) == 1 else gain[:n])
        if norm is normwise.LayerNorm:
            truth = truth + (layer.bias if len(shape) == 1 else layer.bias[:n])
        if n == 0:
            assert not y[i].any()
            continue
        assert_close(y[i, :n], truth)
        (grad,) = torch.autograd.grad(truth, leaf, upstream[i, :n], retain_graph=True)
        assert_close(grads[0][i, :n], grad[i, :n], kind="grad", scale=1.0)
    assert not y[~valid].any()
    assert not grads[0][~valid].any()


CALLS = {"alone": {}, "add": {"add": 1}, "shift": {"shift": 1}, "gate": {"gate": 1}}


@pytest.mark.parametrize("given", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("dim", [None, -1, (2,)])
@pytest.mark.parametrize("norm", [normwise.LayerNorm, normwise.RMSNorm])
def test_lengths_of_trailing_features_count_axis_1(norm, dim, given) -> None:
    """(N, L, D) with lengths is (N, L, D) with the mask that these mean, output and all gradients."""
    layer = randomize(norm(CHANNELS, dim=dim, act="silu"))
    x, lengths = torch.randn(4, STEPS, CHANNELS), torch.tensor([0, 2, STEPS, 1])
    valid = torch.arange(STEPS) < lengths[:, None]
    given = {name: torch.randn_like(x) for name in given}

    def run(**told) -> list[Tensor]:
        leaf = poisoned(x, valid[..., None]).requires_grad_()
        y = layer(leaf, **given, **told)
        y = torch.cat(y) if isinstance(y, tuple) else y
        return [y.detach(), *torch.autograd.grad(y, [leaf, *layer.parameters()], torch.ones_like(y).cumsum(-1))]

    found, expected = run(lengths=lengths.tolist()), run(mask=valid)
    assert all(map(torch.equal, found, expected))
    assert not found[0][:4][~valid].any()
    assert torch.isfinite(found[0]).all()


@pytest.mark.parametrize("shape", [(2, 3, STEPS, CHANNELS), (2, CHANNELS)], ids=str)
def test_lengths_of_trailing_features_need_one_axis_of_steps(shape) -> None:
    for others in ({}, {"shift": torch.zeros(CHANNELS)}):
        with pytest.raises(ValueError, match=r"axis 1 of an input \(N, L, D\) .*but got.*give mask=, True = valid"):
            normwise.RMSNorm(CHANNELS)(torch.randn(shape), lengths=[1, 2], **others)


@given(st.data())
def test_any_mask_that_broadcasts(data: st.DataObject) -> None:
    """A mask of fewer axes says the same as the mask that it broadcasts to."""
    shape = (3, 4, 2, 5)
    mask_shape = tuple(data.draw(st.sampled_from([1, s])) for s in shape)
    mask = torch.rand(mask_shape) < 0.7
    full = mask.expand(shape).clone()
    for layer in (
        normwise.GroupNorm(2, 4),
        normwise.InstanceNorm2d(4),
        normwise.LayerNorm((2, 5)),
        normwise.RMSNorm((2, 5)),
    ):
        x = torch.randn(shape)
        assert_close(layer(x, mask=mask), layer(x, mask=full), count=20)


def test_lengths_count_the_last_axis_of_images_too() -> None:
    layer = normwise.BatchNorm2d(3)
    x = torch.randn(2, 3, 4, 5)
    lengths = torch.tensor([2, 5], dtype=torch.int32)
    mask = (torch.arange(5) < lengths[:, None])[:, None].expand(2, 4, 5)
    torch.testing.assert_close(layer(x, lengths=lengths), layer(x, mask=mask))


@each_layer
def test_gradcheck_with_lengths(name: str) -> None:
    layer = double(name)
    x = torch.randn(3, CHANNELS, STEPS, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([0, 3, STEPS])
    names = [n for n, _ in layer.named_parameters()]

    def f(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,), {"lengths": lengths})

    inputs = (x, *layer.parameters())
    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)
