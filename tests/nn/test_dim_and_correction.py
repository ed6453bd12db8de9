"""Channels on another axis, and the divisor of the running variance."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normwise
from support.backends import using
from support.tolerances import assert_close

CHANNELS = 6

LAYERS: dict[str, Any] = {
    "batch": lambda **o: normwise.BatchNorm2d(CHANNELS, **o),
    "ghost": lambda **o: normwise.BatchNorm2d(CHANNELS, virtual_batch_size=2, **o),
    "group": lambda **o: normwise.GroupNorm(3, CHANNELS, act="silu", **o),
    "instance": lambda **o: normwise.InstanceNorm2d(CHANNELS, affine=True, track_running_stats=True, **o),
}


def pair(name: str, **options: Any) -> tuple[nn.Module, nn.Module]:
    """A layer of channels on axis 1, and the same of channels elsewhere."""
    plain, other = LAYERS[name](), LAYERS[name](**options)
    for parameter in plain.parameters():
        nn.init.normal_(parameter, 1.0, 0.3)
    other.load_state_dict(plain.state_dict())
    return plain, other


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dim", [-1, 2, 3])
@pytest.mark.parametrize("name", LAYERS)
def test_another_axis_is_the_same_norm(name, dim, training):
    plain, other = pair(name, dim=dim)
    plain.train(training), other.train(training)
    x, r = torch.randn(2, 4, CHANNELS, 3, 5)
    mask = torch.rand(4, 3, 5) < 0.8
    full = mask[:, None].expand(x.shape)
    for first, second in (
        ({}, {}),
        ({"residual": r}, {"residual": r.movedim(1, dim)}),
        ({"mask": mask}, {"mask": mask}),
        ({"mask": full}, {"mask": full.movedim(1, dim)}),
    ):
        a, b = x.clone().requires_grad_(), x.movedim(1, dim).contiguous().requires_grad_()
        upstream = torch.randn_like(a)
        y, z = plain(a, **first), other(b, **second)
        assert_close(z.movedim(dim, 1), y, kind="composed")
        y.backward(upstream)
        z.backward(upstream.movedim(1, dim))
        assert_close(b.grad.movedim(dim, 1), a.grad, kind="composed", count=x.numel())
    for one, two in zip(plain.buffers(), other.buffers(), strict=True):
        assert_close(two.float(), one.float())


def test_sequences_with_features_last():
    norm = normwise.BatchNorm1d(CHANNELS, dim=-1)
    x = torch.randn(4, 7, CHANNELS)
    lengths = torch.tensor([7, 3, 5, 1])
    y = norm(x, lengths=lengths)
    assert_close(y, normwise.BatchNorm1d(CHANNELS)(x.transpose(1, 2), lengths=lengths).transpose(1, 2))
    assert (y[1, 3:] == 0).all()
    one = normwise.InstanceNorm1d(CHANNELS, dim=-1)
    assert_close(one(x[0]), one(x)[0])


@pytest.mark.parametrize("name", LAYERS)
def test_an_axis_that_holds_no_channels_is_refused(name):
    with pytest.raises(ValueError, match="samples"):
        LAYERS[name](dim=0)
    with pytest.raises(normwise.ShapeError, match="out of range"):
        LAYERS[name](dim=4)(torch.randn(2, CHANNELS, 3, 3))


def keras(x: Tensor, momentum: float, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """Moving averages of biased variances."""
    dims = (0, *range(2, x.dim()))
    new = x.double().mean(dims), x.double().var(dims, unbiased=False)
    return mean + momentum * (new[0] - mean), var + momentum * (new[1] - var)


@pytest.mark.parametrize("backend", ["cpu", "aten", "reference", None])
@pytest.mark.parametrize("shape", [(3, CHANNELS), (2, CHANNELS, 3, 1)])
def test_the_running_variance_is_biased_without_a_correction(shape, backend):
    make = normwise.BatchNorm1d if len(shape) == 2 else normwise.BatchNorm2d
    norm = make(CHANNELS, correction=0, momentum=0.3)
    mean, var = torch.zeros(CHANNELS, dtype=torch.float64), torch.ones(CHANNELS, dtype=torch.float64)
    twin = make(CHANNELS)
    for _ in range(3):
        x = torch.randn(shape) * 4 + 1
        mean, var = keras(x, 0.3, mean, var)
        with using(backend) if backend else normwise.backend(None):
            y = norm(x)
        assert_close(y, twin(x))  # the output is the same
    assert_close(norm.running_mean, mean.float())
    assert_close(norm.running_var, var.float())
    assert norm.num_batches_tracked == 3


def test_it_holds_with_masks_cumulative_averages_and_ghosts():
    x = torch.randn(6, CHANNELS, 5)
    mask = torch.rand(6, 5) < 0.7
    valid = x.movedim(1, 2)[mask]
    norm = normwise.BatchNorm1d(CHANNELS, correction=0, momentum=None)
    norm(x, mask=mask)
    assert_close(norm.running_var, valid.var(0, unbiased=False))
    ghost = normwise.BatchNorm1d(CHANNELS, correction=0, momentum=1.0, virtual_batch_size=2)
    ghost(x)
    assert_close(ghost.running_var, x.var((0, 2), unbiased=False))


def test_a_batch_that_is_not_finite_moves_nothing():
    norm = normwise.BatchNorm1d(CHANNELS, correction=0)
    before = copy.deepcopy(norm.state_dict())
    with pytest.warns(UserWarning, match="skipped"):
        norm(torch.full((3, CHANNELS), torch.inf))
    assert all(torch.equal(v, before[k]) for k, v in norm.state_dict().items())


def test_gradients_with_a_correction_are_those_without():
    x = torch.randn(5, CHANNELS, dtype=torch.float64, requires_grad=True)
    one, two = normwise.BatchNorm1d(CHANNELS).double(), normwise.BatchNorm1d(CHANNELS, correction=0).double()
    upstream = torch.randn(5, CHANNELS, dtype=torch.float64)
    for a, b in zip(*(torch.autograd.grad(n(x), (x, n.weight), upstream) for n in (one, two)), strict=True):
        assert_close(b, a)


def test_recalibration_follows_the_correction():
    model = nn.Sequential(normwise.BatchNorm1d(CHANNELS, correction=0))
    batches = [torch.randn(8, CHANNELS) * 3 for _ in range(4)]
    normwise.recalibrate(model, batches)
    assert_close(model[0].running_var, torch.cat(batches).var(0, unbiased=False))


@pytest.mark.parametrize("value", [2, -1])
def test_other_corrections_are_refused(value):
    with pytest.raises(ValueError, match="correction must be 1"):
        normwise.BatchNorm1d(CHANNELS, correction=value)


def test_compiled_without_a_break():
    norm = normwise.BatchNorm1d(CHANNELS, correction=0, dim=-1)
    twin = copy.deepcopy(norm)
    x = torch.randn(4, 7, CHANNELS)
    assert_close(torch.compile(twin, backend="aot_eager", fullgraph=True)(x), norm(x), kind="composed")
    assert_close(twin.running_var, norm.running_var)


# What else takes a norm's channels from its input.


def test_converted_layers_keep_the_axis():
    model = nn.Sequential(normwise.BatchNorm2d(8, dim=-1))
    x = torch.randn(4, 5, 3, 8)
    model(x)
    model.eval()
    expected = model(x)
    for to in ("frozen", "renorm", "sync"):
        assert_close(normwise.convert(model, to=to)[0](x), expected)
    group, _ = normwise.convert(model, to="group", num_groups=2)
    assert_close(group(x), normwise.functional.group_norm(x, 2, *model[0].parameters(), dim=-1))
    layer, _ = normwise.convert(model, to="layer")
    assert_close(layer(x), normwise.functional.layer_norm(x, [8], *model[0].parameters()), kind="composed")
    with pytest.raises(ValueError, match="axis 1"):
        normwise.convert(model, to="torch")


def test_recalibration_and_accumulation_keep_the_axis():
    batches = [torch.randn(4, 7, CHANNELS) * 2 + 1 for _ in range(3)]
    whole = torch.cat(batches)
    model = nn.Sequential(normwise.BatchNorm1d(CHANNELS, dim=-1, correction=0, momentum=1.0))
    normwise.recalibrate(model, batches)
    assert_close(model[0].running_mean, whole.mean((0, 1)))
    assert_close(model[0].running_var, whole.var((0, 1), unbiased=False))
    twin = copy.deepcopy(model)
    total = normwise.accumulated_backward(model, batches, lambda x: model(x).square().sum())
    loss = twin(whole).square().sum()
    loss.backward()
    assert_close(total, loss, kind="composed", count=whole.numel())
    assert_close(model[0].weight.grad, twin[0].weight.grad, kind="composed", count=whole.numel())
    assert_close(model[0].running_var, whole.var((0, 1), unbiased=False))


def test_fold_leaves_channels_of_another_axis():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), normwise.BatchNorm2d(8, dim=-1)).eval()
    with pytest.raises(ValueError, match="axis -1"):
        normwise.fold(model)


def test_diagnosis_looks_at_the_same_numbers():
    found = []
    x = [torch.randn(8, CHANNELS, 5) * 3 + 1 for _ in range(2)]
    for dim in (1, -1):
        model = nn.Sequential(normwise.BatchNorm1d(CHANNELS, dim=dim))
        data = [b.movedim(1, dim) for b in x]
        pairs = [(b, torch.zeros(())) for b in data]
        report = normwise.diagnose(model, pairs, loss=lambda y, _: y.square().mean())
        (layer,) = [layer for layer in report.layers if layer.norm is not None]
        found.append(layer.norm)
    assert (found[0].values, found[0].samples) == (found[1].values, found[1].samples)
    assert found[0].running.distance == found[1].running.distance


@pytest.mark.parametrize("layer", [normwise.SyncBatchNorm, normwise.BatchRenorm2d, normwise.FrozenBatchNorm2d])
def test_other_batch_norms_have_the_axis_too(layer):
    x = torch.randn(4, CHANNELS, 3, 2)
    assert_close(layer(CHANNELS, dim=-1)(x.movedim(1, -1)).movedim(-1, 1), layer(CHANNELS)(x))


def test_renorm_follows_the_correction():
    x = torch.randn(9, CHANNELS)
    norm = normwise.BatchRenorm1d(CHANNELS, correction=0, momentum=1.0)
    norm(x)
    assert_close(norm.running_var, x.var(0, unbiased=False))


def test_ports_from_keras_and_flax_train_on_exactly():
    gamma, beta, mean, var = torch.rand(4, CHANNELS) + 0.5
    norm = normwise.from_keras(normwise.BatchNorm1d, [gamma, beta, mean, var], momentum=0.9)
    x = torch.randn(5, CHANNELS)
    norm(x)
    assert_close(norm.running_var, 0.9 * var + 0.1 * x.var(0, unbiased=False))
    assert normwise.from_flax(normwise.BatchNorm1d, {"scale": gamma}, {"mean": mean, "var": var}).correction == 0
    assert normwise.from_keras(normwise.BatchNorm1d, [gamma, beta, mean, var], correction=1).correction == 1
    assert isinstance(normwise.from_keras(nn.BatchNorm1d, [gamma, beta, mean, var]), nn.BatchNorm1d)
