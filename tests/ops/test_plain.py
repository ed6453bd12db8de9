"""Plain calls, an input with gain and bias alone: which way they take, and what leaves it.

Whoever looks on from outside, and sees ATen's operations only, must see them: torch.func, forward-mode derivatives,
batches of gradients, make_fx, torch.jit.trace.
"""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrize

import normwise
from normwise.backends.cpu import library
from normwise.ops import plain
from tolerances import assert_close

pytestmark = [
    pytest.mark.skipif(library.missing() is not None, reason=f"no compiled library: {library.missing()}"),
    pytest.mark.usefixtures("poisoned_memory"),
]

FEATURES = 12


def unbiased(layer: nn.Module) -> nn.Module:
    """Without its bias: torch's BatchNorm takes `bias=False` since 2.13."""
    layer.register_parameter("bias", None)
    return layer


LAYERS: dict[str, Callable[..., tuple[nn.Module, nn.Module]]] = {
    "LayerNorm": lambda: (normwise.LayerNorm(FEATURES), nn.LayerNorm(FEATURES)),
    "LayerNorm without bias": lambda: (normwise.LayerNorm(FEATURES, bias=False), nn.LayerNorm(FEATURES, bias=False)),
    "LayerNorm bare": lambda: (
        normwise.LayerNorm(FEATURES, elementwise_affine=False),
        nn.LayerNorm(FEATURES, elementwise_affine=False),
    ),
    "RMSNorm": lambda: (normwise.RMSNorm(FEATURES), nn.RMSNorm(FEATURES)),
    "BatchNorm": lambda: (normwise.BatchNorm1d(FEATURES), nn.BatchNorm1d(FEATURES)),
    "BatchNorm bare": lambda: (
        normwise.BatchNorm1d(FEATURES, affine=False),
        nn.BatchNorm1d(FEATURES, affine=False),
    ),
    "BatchNorm without bias": lambda: (normwise.BatchNorm1d(FEATURES, bias=False), unbiased(nn.BatchNorm1d(FEATURES))),
    "BatchNorm eval": lambda: (normwise.BatchNorm1d(FEATURES).eval(), nn.BatchNorm1d(FEATURES).eval()),
}
each_layer = pytest.mark.parametrize("name", LAYERS)
each_size = pytest.mark.parametrize("rows", [8, 512], ids=["small", "large"])


def pair(name: str) -> tuple[nn.Module, nn.Module]:
    """Ours and torch's, with the same random parameters and averages."""
    ours, theirs = LAYERS[name]()
    with torch.no_grad():
        for p in ours.parameters():
            p.copy_(torch.rand_like(p) + 0.5)
        if isinstance(ours, nn.BatchNorm1d):
            assert ours.running_mean is not None
            assert ours.running_var is not None
            ours.running_mean.normal_()
            ours.running_var.uniform_(0.5, 2)
    theirs.load_state_dict(ours.state_dict(), strict=False)
    return ours, theirs


def gradients(layer: nn.Module, x: Tensor, dy: Tensor, **options: bool) -> list[Tensor]:
    y = layer(x)
    return [y, *torch.autograd.grad(y, [x, *layer.parameters()], dy, **options)]


def agree(found: list[Tensor], expected: list[Tensor], count: int) -> None:
    for got, truth in zip(found, expected, strict=True):
        assert_close(got, truth, kind="grad", count=count)


@each_layer
@each_size
def test_results_gradients_and_averages_are_those_of_torch(name: str, rows: int) -> None:
    ours, theirs = pair(name)
    x, dy = torch.randn(rows, FEATURES, requires_grad=True), torch.randn(rows, FEATURES)
    agree(gradients(ours, x, dy), gradients(theirs, x, dy), count=rows * FEATURES)
    strided = torch.randn(FEATURES, rows).T  # an upstream gradient that does not lie like the input
    agree(gradients(ours, x, strided), gradients(theirs, x, strided), count=rows * FEATURES)
    for key, value in theirs.state_dict().items():
        assert_close(ours.state_dict()[key].float(), value.float(), kind="grad", count=rows, name=key)
    with torch.no_grad():
        assert_close(ours(x), theirs(x), count=rows)


@each_layer
@each_size
def test_an_input_changed_before_the_backward_is_an_error(name: str, rows: int) -> None:
    x = torch.randn(rows, FEATURES, requires_grad=True)
    for layer in pair(name):
        before = x * 1
        y = layer(before)
        before.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward(torch.randn(rows, FEATURES))


@each_layer
@each_size
def test_a_second_backward_needs_the_graph_kept(name: str, rows: int) -> None:
    x, dy = torch.randn(rows, FEATURES, requires_grad=True), torch.randn(rows, FEATURES)
    for layer in pair(name):
        y = layer(x)
        first, again = (torch.autograd.grad(y, x, dy, retain_graph=keep)[0] for keep in (True, False))
        assert torch.equal(first, again)
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            y.backward(dy)


def test_the_way_that_plain_calls_take(monkeypatch: pytest.MonkeyPatch) -> None:
    def node(layer: nn.Module, rows: int) -> str:
        return type(layer(torch.randn(rows, FEATURES)).grad_fn).__name__

    assert node(normwise.LayerNorm(FEATURES), 8) == "NativeLayerNormBackward0"
    assert node(normwise.LayerNorm(FEATURES), 512) == "_RowsBackward"
    assert type(normwise.LayerNorm(4096)(torch.randn(1, 4096)).grad_fn).__name__ == "_RowsBackward"
    assert node(normwise.RMSNorm(FEATURES), 8) == "_RowsBackward"
    assert node(normwise.BatchNorm1d(FEATURES), 8) == "_ChannelsBackward"
    assert node(normwise.BatchNorm1d(FEATURES).eval(), 8) == "_ChannelsBackward"
    taken: list[object] = []
    for name in ("layer_norm", "rms_norm", "batch_norm"):
        way = getattr(plain, name)
        monkeypatch.setattr(plain, name, lambda *args, way=way: taken.append(way(*args)) or taken[-1])
    x = torch.randn(8, FEATURES)
    for ours, _ in map(pair, LAYERS):
        ours(x)
    assert len(taken) == len(LAYERS)
    assert None not in taken


@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm", "BatchNorm1d"])
def test_what_a_layer_is_given_later_counts(kind: str) -> None:
    layer = getattr(normwise, kind)(FEATURES)
    x = torch.randn(8, FEATURES)
    before = layer(x)
    layer.act = "relu"
    assert_close(layer(x), before.relu())
    layer.act = None
    again = pickle.loads(pickle.dumps(copy.deepcopy(layer)))
    assert_close(again(x), before)
    layer.register_parameter("weight", None)
    if kind != "RMSNorm":
        layer.register_parameter("bias", None)
    assert_close(layer(x), before)  # gain 1, bias 0


@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm", "BatchNorm1d"])
def test_a_parametrized_gain(kind: str) -> None:
    class Doubled(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return 2 * w

    layer = getattr(normwise, kind)(FEATURES)
    x = torch.randn(8, FEATURES)
    before = layer(x)
    parametrize.register_parametrization(layer, "weight", Doubled())
    y = layer(x)
    assert_close(y, 2 * before)
    y.square().sum().backward()
    assert layer.parametrizations.weight.original.grad is not None


@pytest.mark.parametrize("rows", [2, 512])
def test_a_mean_that_dwarfs_the_deviation(rows: int) -> None:
    x = torch.randn(rows, FEATURES) + 1e4
    exact = nn.functional.layer_norm(x.double(), (FEATURES,))
    assert_close(normwise.LayerNorm(FEATURES)(x), exact, count=FEATURES)
    exact = nn.functional.batch_norm(x.double(), None, None, training=True)
    assert_close(normwise.BatchNorm1d(FEATURES)(x), exact, count=rows)


def test_a_batch_that_is_not_finite_moves_nothing() -> None:
    layer = normwise.BatchNorm1d(FEATURES)
    x = torch.randn(8, FEATURES)
    x[3, 5] = torch.nan
    kept = copy.deepcopy(layer.state_dict())
    with pytest.warns(UserWarning, match="left a batch out") as caught:
        layer(x)
    assert caught[0].filename == __file__
    assert layer.num_batches_skipped == 1
    for key, value in layer.state_dict().items():
        assert torch.equal(value, kept[key])


@each_layer
@each_size
def test_batches_of_gradients(name: str, rows: int) -> None:
    ours, theirs = pair(name)
    x, dy = torch.randn(rows, FEATURES, requires_grad=True), torch.randn(3, rows, FEATURES)
    for layer in (ours, theirs):
        layer(x)
    (found,) = torch.autograd.grad(ours(x), x, dy, is_grads_batched=True)
    expected = torch.stack([torch.autograd.grad(theirs(x), x, d)[0] for d in dy])
    assert_close(found, expected, kind="grad", count=rows)
    y = ours(x)
    mapped = torch.func.vmap(lambda d: torch.autograd.grad(y, x, d, retain_graph=True)[0])(dy)
    assert_close(mapped, expected, kind="grad", count=rows)


@each_layer
@each_size
def test_forward_mode_derivatives(name: str, rows: int) -> None:
    ours, theirs = pair(name)
    x, v = torch.randn(rows, FEATURES), torch.randn(rows, FEATURES)
    tangents = []
    for layer in (ours, theirs):
        with forward_ad.dual_level():
            tangents.append(forward_ad.unpack_dual(layer(forward_ad.make_dual(x, v))).tangent)
    assert_close(tangents[0], tangents[1], kind="grad", count=rows * FEATURES)


@each_layer
@each_size
def test_a_gradient_stored_with_its_sign_apart(name: str, rows: int) -> None:
    ours, theirs = pair(name)
    x, z = torch.randn(rows, FEATURES, requires_grad=True), torch.randn(rows, FEATURES, 2)
    dy = torch.view_as_complex(z).conj().imag
    assert dy.is_neg()
    agree(gradients(ours, x, dy), gradients(theirs, x, dy), count=rows * FEATURES)
    dy = torch._neg_view(torch.randn(rows, FEATURES))
    agree(gradients(ours, x, dy), gradients(theirs, x, dy), count=rows * FEATURES)


@each_layer
@each_size
def test_second_derivatives(name: str, rows: int) -> None:
    ours, theirs = pair(name)
    x, dy = torch.randn(rows, FEATURES, requires_grad=True), torch.randn(rows, FEATURES, requires_grad=True)
    v = torch.randn(rows, FEATURES)
    second = []
    for layer in (ours, theirs):
        dx = gradients(layer, x, dy, create_graph=True)[1]
        second.append(torch.autograd.grad(dx, [x, dy], v, materialize_grads=True))
    agree(list(second[0]), list(second[1]), count=rows * FEATURES)


@each_layer
@each_size
def test_a_traced_graph_holds_the_norm(name: str, rows: int) -> None:
    x, other = torch.randn(rows, FEATURES), torch.randn(rows, FEATURES)
    graph = make_fx(pair(name)[0])(x)
    assert any("norm" in str(n.target) or "rsqrt" in str(n.target) for n in graph.graph.nodes)
    layer = LAYERS[name]()[0].eval()
    stored = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # sizes are looked at, and are those of x ever after
        traced = torch.jit.trace(layer, x)
        torch.jit.save(traced, stored)
        stored.seek(0)
        again = torch.jit.load(stored)
    assert_close(again(other), layer(other), count=rows)


@each_layer
@each_size
def test_tensors_left_over_from_a_transform(name: str, rows: int) -> None:
    left: list[Tensor] = []
    torch.func.grad(lambda x: left.append(x * 1) or x.sum())(torch.randn(rows, FEATURES))
    ours, theirs = pair(name)
    with torch.no_grad():
        assert_close(ours(left[0]), theirs(left[0]), count=rows)


@each_layer
@each_size
def test_a_default_device_is_not_that_of_the_input(name: str, rows: int) -> None:
    ours, theirs = pair(name)
    x, dy = torch.randn(rows, FEATURES, requires_grad=True), torch.randn(rows, FEATURES)
    with torch.device("meta"):
        found = gradients(ours, x, dy)
    agree(found, gradients(theirs, x, dy), count=rows * FEATURES)


@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm", "BatchNorm1d"])
@each_size
def test_a_gain_on_another_device_is_refused(kind: str, rows: int) -> None:
    layer = getattr(normwise, kind)(FEATURES)
    layer.weight = nn.Parameter(torch.ones(FEATURES, device="meta"))
    with pytest.raises(RuntimeError, match=r"expected device cpu|same device"):
        layer(torch.randn(rows, FEATURES))
