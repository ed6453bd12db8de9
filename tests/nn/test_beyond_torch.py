"""What torch.nn lacks: any axes, activation, residual, ragged inputs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence

import normwise
from support.backends import using
from support.kernel_truth import ACTIVATIONS as ACTS
from support.norm_cases import added, randomize
from support.tolerances import assert_close

each_norm = pytest.mark.parametrize("norm", [normwise.LayerNorm, normwise.RMSNorm])


@each_norm
@pytest.mark.parametrize("dim", [1, -3, (1,), (1, 3), (3, 1), (2, 3), (-1, 1, 2)], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels-last"])
def test_any_axes(norm: type[nn.Module], dim: int | tuple[int, ...], layout: torch.memory_format) -> None:
    """Against moving those axes to the end, where torch.nn normalizes."""
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    dims = (dim,) if isinstance(dim, int) else dim
    shape = [x.shape[d] for d in dims]
    layer = randomize(norm(shape, dim=dim, eps=1e-3, dtype=torch.float64))
    plain = getattr(nn, norm.__name__)(shape, eps=1e-3, dtype=torch.float64)
    plain.load_state_dict(layer.state_dict())
    trailing = tuple(range(-len(dims), 0))
    y = layer(x)
    truth = plain(x.movedim(dims, trailing)).movedim(trailing, dims)
    upstream = torch.randn_like(y)
    assert_close(y, truth)
    ours = torch.autograd.grad(y, [x, *layer.parameters()], upstream)
    theirs = torch.autograd.grad(truth, [x, *plain.parameters()], upstream)
    for got, expected in zip(ours, theirs, strict=True):
        assert_close(got, expected, kind="grad")
    assert f"dim={dim}" in repr(layer)


@pytest.mark.parametrize("act", [None, *ACTS])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_batch_norm_act_and_residual(act: str | None, with_residual: bool, training: bool) -> None:
    """As in residual nets: the residual is added between the norm and the activation."""
    layer = randomize(normwise.BatchNorm2d(4, act=act, dtype=torch.float64)).train(training)
    plain = nn.BatchNorm2d(4, dtype=torch.float64).train(training)
    plain.load_state_dict(layer.state_dict())
    x, r = (torch.randn(3, 4, 2, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    y = layer(x, residual=r) if with_residual else layer(x)
    truth = plain(x) + r if with_residual else plain(x)
    truth = truth if act is None else ACTS[act](truth)
    upstream = torch.randn_like(y)
    leaves = [x, r] if with_residual else [x]
    assert_close(y, truth)
    for a, b in zip(
        torch.autograd.grad(y, [*leaves, *layer.parameters()], upstream),
        torch.autograd.grad(truth, [*leaves, *plain.parameters()], upstream),
        strict=True,
    ):
        assert_close(a, b, kind="grad")


@each_norm
@pytest.mark.parametrize("act", [None, *ACTS])
def test_layer_norm_residual_gives_the_pair(norm: type[nn.Module], act: str | None) -> None:
    """As in pre-norm transformers: the sum is normalized and handed on."""
    layer = randomize(norm(6, act=act, dtype=torch.float64))
    plain = getattr(nn, norm.__name__)(6, dtype=torch.float64)
    plain.load_state_dict(layer.state_dict())
    x, r = (torch.randn(3, 2, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    y, total = layer(x, add=r)
    truth = plain(x + r)
    truth = truth if act is None else ACTS[act](truth)
    assert_close(y, truth)
    assert_close(total, x + r)
    upstream = torch.randn_like(y), torch.randn_like(y)
    for a, b in zip(
        torch.autograd.grad((y, total), [x, r, *layer.parameters()], upstream),
        torch.autograd.grad((truth, x + r), [x, r, *plain.parameters()], upstream),
        strict=True,
    ):
        assert_close(a, b, kind="grad")


@pytest.mark.parametrize("spoilt", [float("nan"), float("inf")])
@pytest.mark.parametrize("backend", ["kernels", "no kernels", "reference"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: normwise.BatchNorm1d(4, act="gelu"),
        lambda: normwise.BatchNorm1d(4, act="silu").eval(),
        lambda: normwise.GroupNorm(2, 4, act="silu"),
        lambda: normwise.InstanceNorm1d(4, act="gelu"),
        lambda: normwise.LayerNorm(4, dim=1, act="gelu"),
        lambda: normwise.RMSNorm(4, dim=1),
        # softplus(0) is not 0
        lambda: normwise.BatchNorm1d(4, act="softplus"),
        lambda: normwise.BatchNorm1d(4, act="softplus", virtual_batch_size=2),
        lambda: normwise.GroupNorm(2, 4, act="softplus"),
        lambda: normwise.RMSNorm(4, dim=1, act="softplus", offset=1.0),
    ],
    ids=[
        "batch",
        "batch eval",
        "group",
        "instance",
        "layer",
        "rms",
        *(f"{n} softplus" for n in ("batch", "ghost", "group", "rms")),
    ],
)
def test_padding_stays_zero_beside_a_residual(make: Callable[[], nn.Module], backend: str, spoilt: float) -> None:
    """Whatever input, residual and upstream gradient hold there, to the second derivative."""
    layer, lengths = make(), torch.tensor([3, 5, 4])
    if backend == "kernels" and getattr(layer, "virtual_batch_size", None):
        pytest.skip("the kernels take one mask for all channels, and ghost batches are channels")
    padding = (torch.arange(5) >= lengths[:, None]).unsqueeze(1).expand(3, 4, 5)
    x, r, upstream = (torch.randn(3, 4, 5).masked_fill(padding, spoilt) for _ in range(3))
    leaves = [x.requires_grad_(), r.requires_grad_(), *layer.parameters()]
    with using(backend):
        y = layer(x, **added(layer, r), lengths=lengths)
        outputs = list(y) if isinstance(y, tuple) else [y]
        first = torch.autograd.grad(outputs, leaves, [upstream] * len(outputs), create_graph=True)
        second = torch.autograd.grad(first[0], leaves, torch.randn_like(x), allow_unused=True)
    for tensors in (outputs, first, second):
        assert all(t.isfinite().all() for t in tensors if t is not None)
        assert not any(t[padding].any() for t in tensors[:2] if t is not None)
    assert all(grad[~padding].all() for grad in first[:2])


@pytest.mark.parametrize(
    ("make", "plain"),
    [
        (lambda: normwise.BatchNorm1d(4, act="silu"), lambda x, w: F.batch_norm(x, None, None, w, training=True)),
        (lambda: normwise.GroupNorm(2, 4, act="silu"), lambda x, w: F.group_norm(x, 2, w)),
        (lambda: normwise.LayerNorm(4, act="silu"), lambda x, w: F.layer_norm(x, (4,), w)),
    ],
    ids=["batch", "group", "layer"],
)
def test_tensors_stored_with_their_sign_apart(make: Callable[[], nn.Module], plain: Callable[..., Tensor]) -> None:
    """As the imaginary part of a conjugate is: what lies in memory is not what counts."""
    layer, x = make(), torch.randn(3, 4, 4, requires_grad=True)
    weight, r, upstream = (torch._neg_view(torch.randn(shape)) for shape in ((4,), (3, 4, 4), (3, 4, 4)))
    del layer.weight
    layer.weight = weight
    with using("chosen"):
        y = layer(x, **added(layer, r))
        y = y[0] if isinstance(y, tuple) else y
        (got,) = torch.autograd.grad(y, x, upstream)
    exact, w, summand = x.detach().double().requires_grad_(), weight.double(), r.double()
    sum_first = isinstance(layer, normwise.LayerNorm)
    truth = F.silu(plain(exact + summand, w) if sum_first else plain(exact, w) + summand)
    assert_close(y, truth, count=12)
    assert_close(got, torch.autograd.grad(truth, exact, upstream.double())[0], kind="grad", count=12)


def sequences(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(n, 4, dtype=dtype, requires_grad=True) for n in (3, 5, 1)]


RAGGED = {
    "BatchNorm1d": lambda m: m.BatchNorm1d(4, dtype=torch.float64),
    "LayerNorm": lambda m: m.LayerNorm(4, dtype=torch.float64),
    "RMSNorm": lambda m: m.RMSNorm(4, dtype=torch.float64),
}


@pytest.mark.parametrize("name", RAGGED)
def test_packed_sequence(name: str) -> None:
    layer, plain = randomize(RAGGED[name](normwise)), RAGGED[name](nn)
    plain.load_state_dict(layer.state_dict())
    parts = sequences()
    y = layer(pack_sequence(parts, enforce_sorted=False))
    assert isinstance(y, PackedSequence)
    truth = plain(torch.cat(parts))
    got = torch.cat(unpack_sequence(y))
    assert_close(got, truth)
    upstream = torch.randn_like(truth)
    for a, b in zip(
        torch.autograd.grad(got, [*parts, *layer.parameters()], upstream),
        torch.autograd.grad(truth, [*parts, *plain.parameters()], upstream),
        strict=True,
    ):
        assert_close(a, b, kind="grad")


@pytest.mark.parametrize("name", RAGGED)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_jagged_nested_tensor(name: str) -> None:
    layer, plain = randomize(RAGGED[name](normwise)), RAGGED[name](nn)
    plain.load_state_dict(layer.state_dict())
    parts = sequences()
    x = torch.nested.as_nested_tensor(parts, layout=torch.jagged)
    y = layer(x)
    assert y.is_nested
    assert y.shape == x.shape  # the same symbolic length, so that x + y works
    truth = plain(torch.cat(parts))
    assert_close((x + y).values(), torch.cat(parts) + truth)
    upstream = torch.randn_like(truth)
    for a, b in zip(
        torch.autograd.grad(y.values(), [*parts, *layer.parameters()], upstream),
        torch.autograd.grad(truth, [*parts, *plain.parameters()], upstream),
        strict=True,
    ):
        assert_close(a, b, kind="grad")


def test_jagged_along_the_last_axis() -> None:
    """(N, C, L) with L jagged, BatchNorm1d's own order of axes."""
    parts = sequences()
    x = torch.nested.as_nested_tensor(parts, layout=torch.jagged).transpose(1, 2)
    y = normwise.BatchNorm1d(4, dtype=torch.float64)(x)
    assert y.shape == x.shape
    assert_close(y.values().mT, nn.BatchNorm1d(4, dtype=torch.float64)(torch.cat(parts)))


@each_norm
def test_packed_residual(norm: type[nn.Module]) -> None:
    x, r = (pack_sequence(sequences(), enforce_sorted=False) for _ in range(2))
    y, total = norm(4, dtype=torch.float64)(x, add=r)
    assert_close(total.data, x.data + r.data)
    assert_close(y.data, norm(4, dtype=torch.float64)(x.data + r.data))


def test_functional_is_what_the_layers_do() -> None:
    x = torch.randn(3, 4, 5)
    f = normwise.functional
    layers = {
        "batch_norm": (normwise.BatchNorm1d(4, track_running_stats=False), (None, None, None, None, True)),
        "instance_norm": (normwise.InstanceNorm1d(4), ()),
        "group_norm": (normwise.GroupNorm(2, 4, affine=False), (2,)),
        "layer_norm": (normwise.LayerNorm(5, elementwise_affine=False), ((5,),)),
        "rms_norm": (normwise.RMSNorm(5, elementwise_affine=False), ((5,),)),
    }
    assert sorted(layers) == sorted(name for name in f.__all__ if name.endswith("_norm"))
    for name, (layer, args) in layers.items():
        torch.testing.assert_close(getattr(f, name)(x, *args), layer(x))
        torch.testing.assert_close(getattr(f, name)(x, *args), getattr(F, name)(x, *args))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("act", [None, "silu", "gelu", "gelu_tanh", "mish"])
@pytest.mark.parametrize("norm", [normwise.LayerNorm, normwise.RMSNorm, normwise.BatchNorm1d])
def test_second_derivatives_with_a_residual(norm: type[nn.Module], act: str | None, masked: bool) -> None:
    layer = randomize(norm(4, act=act, dtype=torch.float64))
    x, r = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mask = torch.tensor([True, False, True]) if masked else None

    def f(x: Tensor, r: Tensor) -> Tensor | tuple[Tensor, ...]:
        return layer(x, **added(layer, r), mask=mask)

    assert torch.autograd.gradcheck(f, (x, r))
    assert torch.autograd.gradgradcheck(f, (x, r))
    # gradgradcheck trusts the gradient that it differentiates: that one must be the plain one.
    y = f(x, r)
    outputs = y if isinstance(y, tuple) else (y,)
    upstream = [torch.randn_like(t) for t in outputs]
    leaves = [x, r, *layer.parameters()]
    plain = torch.autograd.grad(outputs, leaves, upstream, retain_graph=True)
    for got, expected in zip(torch.autograd.grad(outputs, leaves, upstream, create_graph=True), plain, strict=True):
        assert_close(got, expected, kind="grad")
