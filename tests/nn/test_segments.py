"""Norms of segments equal the norm of each segment alone, in whatever order the rows come."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normwise
from normwise import functional as F
from support.tolerances import assert_close

COUNTS = [5, 1, 0, 9, 2]
WIDTH = 6

Alone = Callable[[nn.Module, Tensor], Tensor]


def layers() -> dict[str, tuple[Callable[[], nn.Module], Alone]]:
    """For each name: the layer of rows, and what it computes of one segment (n, C) alone."""

    def plane(layer: Any, x: Tensor) -> Tensor:
        """All rows and features together, gain and bias by feature."""
        rows = x.shape[0]
        if isinstance(layer, nn.RMSNorm):
            return F.rms_norm(x, x.shape, layer.weight.expand(rows, -1), layer.__dict__["eps"], act=layer.act)
        weight, bias = (t.expand(rows, -1) for t in (layer.weight, layer.bias))
        return F.layer_norm(x, x.shape, weight, bias, layer.__dict__["eps"], act=layer.act)

    def channels(layer: Any, x: Tensor) -> Tensor:
        if len(x) == 1:  # no deviation
            y = 0 * x + layer.bias
            return y if layer.act is None else nn.functional.gelu(y)
        y = F.group_norm(x.T[None], WIDTH, layer.weight, layer.bias, layer.__dict__["eps"], act=layer.act)
        return y[0].T

    return {
        "layer": (lambda: normwise.LayerNorm(WIDTH, act="silu"), plane),
        "rms": (lambda: normwise.RMSNorm(WIDTH, eps=1e-3), plane),
        "instance": (lambda: normwise.InstanceNorm1d(WIDTH, affine=True, act="gelu"), channels),
        "batch": (lambda: normwise.BatchNorm1d(WIDTH), channels),
    }


def drawn(dtype: torch.dtype, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """Rows of segments in random order."""
    segments = torch.repeat_interleave(torch.arange(len(COUNTS)), torch.tensor(COUNTS))
    segments = segments[torch.randperm(len(segments))]
    x = torch.randn(len(segments), WIDTH, dtype=torch.float64) * (1 + segments[:, None]) + offset
    return x.to(dtype), segments


def made(name: str, dtype: torch.dtype) -> tuple[nn.Module, Alone]:
    make, alone = layers()[name]
    layer = make().to(dtype)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, 1.0, 0.3)
    return layer, alone


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", layers())
def test_each_segment_is_normalized_as_if_alone(name, dtype):
    layer, alone = made(name, dtype)
    x, segments = drawn(dtype)
    x.requires_grad_()
    y = layer(x, segments=segments)
    upstream = torch.randn_like(y)
    found = torch.autograd.grad(y, (x, *layer.parameters()), upstream)

    twin = x.detach().double().requires_grad_()
    exact = layers()[name][0]().double()
    exact.load_state_dict({k: v.double() for k, v in layer.state_dict().items()}, strict=False)
    whole = torch.empty(x.shape, dtype=torch.float64)
    for i in range(len(COUNTS)):
        rows = segments == i
        if rows.any():
            part = twin[rows]
            whole = whole.masked_scatter(rows[:, None], alone(exact, part))
    expected = torch.autograd.grad(whole, (twin, *exact.parameters()), upstream.double())
    assert_close(y, whole, kind="composed")
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, kind="composed", count=len(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["instance", "batch"])
def test_half_precision_is_rounded_once(name, dtype):
    layer, _ = made(name, dtype)
    x, residual = (torch.randn(400, WIDTH).to(dtype) for _ in range(2))
    segments = torch.randint(9, (400,))
    exact = copy.deepcopy(layer).double()(x.double(), segments=segments, residual=residual.double(), act="silu")
    y = layer(x, segments=segments, residual=residual, act="silu")
    assert (y != exact.to(dtype)).float().mean() < 0.01  # rounding twice makes another number of a third


@pytest.mark.parametrize("name", layers())
def test_what_else_is_in_the_batch_does_not_matter(name):
    layer, _ = made(name, torch.float64)
    x, segments = drawn(torch.float64)
    rows = segments == 3
    alone = layer(x[rows], segments=torch.zeros(int(rows.sum()), dtype=torch.int32))
    assert_close(layer(x, segments=segments)[rows], alone)


@pytest.mark.parametrize("name", layers())
def test_masked_rows_do_not_count(name):
    layer, _ = made(name, torch.float64)
    x, segments = drawn(torch.float64)
    mask = torch.rand(len(x)) < 0.7
    x = x.masked_fill(~mask[:, None], float("nan")).requires_grad_()
    y = layer(x, segments=segments, mask=mask)
    assert_close(y[mask], layer(x[mask], segments=segments[mask]))
    assert (y[~mask] == 0).all()
    y.sum().backward()
    assert (x.grad[~mask] == 0).all()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("name", layers())
def test_gradients_of_gradients(name):
    layer, _ = made(name, torch.float64)
    x, segments = drawn(torch.float64)
    some = x[:7].requires_grad_()
    assert torch.autograd.gradgradcheck(lambda t: layer(t, segments=segments[:7]), some)


def test_numbers_of_segments_may_be_any():
    layer, _ = made("layer", torch.float64)
    x, segments = drawn(torch.float64)
    expected = layer(x, segments=segments)
    assert_close(layer(x, segments=(segments * 1000 + 7).tolist()), expected)


def test_residual_and_add():
    x, segments = drawn(torch.float64)
    r = torch.randn_like(x)
    layer, _ = made("layer", torch.float64)
    y, total = layer(x, segments=segments, add=r)
    assert torch.equal(total, x + r)
    assert_close(y, layer(x + r, segments=segments))
    norm, _ = made("instance", torch.float64)
    assert_close(norm(x, segments=segments, residual=r), nn.functional.gelu(bare(norm, x, segments) + r))


def bare(norm: Any, x: Tensor, segments: Tensor) -> Tensor:
    return F.instance_norm(x, weight=norm.weight, bias=norm.bias, segments=segments)


def test_a_mean_far_from_zero_keeps_its_digits():
    layer, _ = made("instance", torch.float32)
    x, segments = drawn(torch.float32, offset=1e4)
    exact = layers()["instance"][0]().double()
    exact.load_state_dict({k: v.double() for k, v in layer.state_dict().items()})
    assert_close(layer(x, segments=segments), exact(x.double(), segments=segments), kind="composed")


def test_running_averages_are_of_all_rows_for_batch_norm_and_of_segments_for_instance_norm():
    x, segments = drawn(torch.float64)
    batch = normwise.BatchNorm1d(WIDTH, momentum=1.0).double()
    batch(x, segments=segments)
    assert_close(batch.running_mean, x.mean(0))
    assert_close(batch.running_var, x.var(0))
    assert batch.num_batches_tracked == 1
    batch.eval()
    assert_close(batch(x, segments=segments), batch(x))
    instance = normwise.InstanceNorm1d(WIDTH, momentum=1.0, track_running_stats=True).double()
    instance(x, segments=segments)
    means = torch.stack([x[segments == i].mean(0) for i, n in enumerate(COUNTS) if n])
    assert_close(instance.running_mean, means.mean(0))
    assert torch.isfinite(instance.eval()(x, segments=segments)).all()


@pytest.mark.parametrize("name", layers())
def test_compiled_without_a_break(name):
    layer, _ = made(name, torch.float32)
    x, segments = drawn(torch.float32)
    expected = layer(x, segments=segments)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert_close(compiled(x, segments=segments), expected, kind="composed")


def test_half_precision_of_a_model_with_a_cast():
    layer = normwise.RMSNorm(WIDTH, cast="input").bfloat16()
    x, segments = drawn(torch.bfloat16)
    assert layer(x, segments=segments).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda x, s: normwise.LayerNorm(WIDTH)(x, segments=s[:-1]), normwise.ShapeError, "one number for each row"),
        (lambda x, s: normwise.LayerNorm(WIDTH)(x, segments=s.float()), TypeError, "integer"),
        (lambda x, s: normwise.LayerNorm(WIDTH)(x, segments=s - 1), ValueError, "0 or larger"),
        (lambda x, s: normwise.LayerNorm(WIDTH, dim=1)(x, segments=s), ValueError, "together with dim"),
        (lambda x, s: normwise.LayerNorm(WIDTH)(torch.stack([x, x], 1), segments=s), normwise.ShapeError, "flatten"),
        (
            lambda x, s: normwise.RMSNorm(WIDTH)(torch.stack([x, x], 1), segments=s, scale=x),
            normwise.ShapeError,
            "flatten",
        ),
        (lambda x, s: normwise.InstanceNorm2d(WIDTH)(x, segments=s), normwise.ShapeError, "InstanceNorm1d"),
        (
            lambda x, s: normwise.InstanceNorm1d(WIDTH, affine=True)(x[:, :4], segments=s),
            normwise.ShapeError,
            "num_feat",
        ),
        (lambda x, s: normwise.BatchNorm1d(WIDTH, virtual_batch_size=2)(x, segments=s), ValueError, "virtual_batch"),
        (lambda x, s: normwise.BatchNorm1d(WIDTH)(x[..., None], segments=s), normwise.ShapeError, "2D"),
    ],
)
def test_what_is_refused(call, error, words):
    x, segments = drawn(torch.float32)
    with pytest.raises(error, match=words):
        call(x, segments)


def test_other_batch_norms_take_or_refuse_them():
    x, segments = drawn(torch.float32)
    model = nn.Sequential(normwise.BatchNorm1d(WIDTH))
    model[0](x)
    normwise.freeze(model)
    assert torch.equal(model[0](x, segments=segments), model[0](x))
    renorm = normwise.BatchRenorm1d(WIDTH)
    with pytest.raises(ValueError, match="takes no segments"):
        renorm(x, segments=segments)
    assert renorm.eval()(x, segments=segments).shape == x.shape


def test_a_forced_backend_that_cannot_says_so():
    x, segments = drawn(torch.float32)
    with normwise.backend("aten"), pytest.raises(normwise.BackendError, match="segments"):
        normwise.LayerNorm(WIDTH)(x, segments=segments)
    with normwise.backend("reference"):
        normwise.LayerNorm(WIDTH)(x, segments=segments)
