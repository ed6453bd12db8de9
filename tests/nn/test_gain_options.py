"""offset= and cast=: the norms of other people's models, to the bit."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

import normwise
from normwise.ops.norm import gain
from support.backends import ran, using
from support.foreign_norms import GemmaRMSNorm, LayerNorm1P, LlamaRMSNorm, Olmo2RMSNorm, T5LayerNorm
from support.norm_cases import randomize
from support.tolerances import assert_close

HALF = [torch.bfloat16, torch.float16]
each_half = pytest.mark.parametrize("half", HALF, ids=str)
# Their layer, our options, and whether gradients are the same bits too: T5 rounds a part of the input's gradient.
FOREIGN = {
    "Llama": (LlamaRMSNorm, {"cast": "input"}, True),
    "T5": (T5LayerNorm, {"cast": "input"}, False),
    "Gemma": (GemmaRMSNorm, {"offset": 1.0}, True),
    "Olmo2": (Olmo2RMSNorm, {"cast": "output"}, True),
}


def carried(name: str, features: int, x_dtype: torch.dtype, weight_dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    theirs, options, _ = FOREIGN[name]
    layer = randomize(theirs(features, 1e-6)).to(weight_dtype)
    ours = normwise.RMSNorm(features, 1e-6, **options, dtype=weight_dtype)
    ours.load_state_dict(layer.state_dict())
    return layer, ours


def draws(features: int, dtype: torch.dtype) -> list[Tensor]:
    """Of sizes from far below the root of eps to where squares of float16 would overflow."""
    sizes = 10 ** torch.linspace(-4, 2.5, 64, dtype=torch.float64).unsqueeze(-1)
    return [(torch.randn(64, features, dtype=torch.float64) * sizes).to(dtype) for _ in range(6)]


def results(layer: nn.Module, x: Tensor, upstream: Tensor) -> list[Tensor]:
    leaf = x.clone().requires_grad_()
    y = layer(leaf)
    return [y.detach(), *torch.autograd.grad(y, [leaf, *layer.parameters()], upstream.to(y.dtype))]


@each_half
@pytest.mark.parametrize("backend", ["chosen", "no kernels", "aten", "reference"])
@pytest.mark.parametrize("features", [7, 64, 640, 2304])
@pytest.mark.parametrize("name", FOREIGN)
def test_bits_of_the_models(name: str, features: int, backend: str, half: torch.dtype) -> None:
    for weight_dtype in (half, torch.float32):
        if name == "T5" and weight_dtype == torch.float32:
            continue  # see test_t5_beside_a_float32_weight
        theirs, ours = carried(name, features, half, weight_dtype)
        for x in draws(features, half):
            upstream = torch.randn(x.shape)
            expected = results(theirs, x, upstream)
            with using(backend):
                actual = results(ours, x, upstream)
            assert [t.dtype for t in actual] == [t.dtype for t in expected]
            for a, b in zip(*((r if FOREIGN[name][2] else r[:1]) for r in (actual, expected)), strict=True):
                assert torch.equal(a, b)


@each_half
@pytest.mark.parametrize("name", ["Llama", "Gemma"])
def test_bits_of_an_input_that_lies_otherwise_in_memory(name: str, half: torch.dtype) -> None:
    """A sum along another stride adds up in another order, and so do the models'."""
    theirs, ours = carried(name, 640, half, half)
    for x in draws(640, half):
        for view in (
            x.T.contiguous().T,
            x.expand(2, -1, -1),
            torch.cat([x, x], 1)[:, ::2],
            x.view(8, 8, -1).mT.contiguous().mT,
        ):
            upstream = torch.randn(view.shape)
            for a, b in zip(results(ours, view, upstream), results(theirs, view, upstream), strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["Llama", "Gemma"])
def test_bits_on_whatever_device_there_is(name: str, device: torch.device) -> None:
    """A mean on a GPU multiplies by 1 / n, which is no division by n: it must be the same function."""
    theirs, ours = (layer.to(device) for layer in carried(name, 2304, torch.bfloat16, torch.bfloat16))
    for x in draws(2304, torch.bfloat16):
        assert torch.equal(ours(x.to(device)), theirs(x.to(device)))


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("backend", ["chosen", "kernels", "no kernels", "aten", "reference"])
def test_closed_form_in_float32(name: str, backend: str) -> None:
    theirs, ours = carried(name, 640, torch.float32, torch.float32)
    x, upstream = torch.randn(33, 640), torch.randn(33, 640)
    wide, weight = x.double().requires_grad_(), ours.weight.detach().double().requires_grad_()
    y = (ours.offset + weight) * wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    exact = [y, *torch.autograd.grad(y, [wide, weight], upstream.double())]
    with using(backend):
        actual = results(ours, x, upstream)
    for kind, *both, truth in zip(
        ("forward", "grad", "grad"), actual, results(theirs, x, upstream), exact, strict=True
    ):
        for got in both:
            assert_close(got, truth, kind=kind, count=640)


@each_half
def test_t5_beside_a_float32_weight(half: torch.dtype) -> None:
    """It then rounds nowhere, which neither cast does: ours rounds once, to half precision, and multiplies in
    float32."""
    theirs, ours = carried("T5", 640, half, torch.float32)
    x = draws(640, half)[0]
    y, expected = ours(x), theirs(x)
    assert y.dtype == expected.dtype == torch.float32
    bound = torch.finfo(half).eps * expected.abs() + torch.finfo(half).smallest_normal
    assert ((y - expected).abs() <= bound).all()
    assert not torch.equal(y, expected)


@each_half
@pytest.mark.parametrize("norm", [normwise.LayerNorm, normwise.RMSNorm])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_cast_input_is_torch_s_own_multiplication(norm: type[nn.Module], offset: float, half: torch.dtype) -> None:
    for weight_dtype in (half, torch.float32):
        layer = randomize(norm(48, 1e-6, offset=offset, cast="input", dtype=weight_dtype))
        bare = norm(48, 1e-6, elementwise_affine=False, offset=offset, cast="input")
        x = draws(48, half)[0]
        with normwise.backend("aten"):
            z = bare(x)
            y = layer(x)
        expected = (layer.weight + offset if offset else layer.weight) * z
        expected = expected if getattr(layer, "bias", None) is None else expected + layer.bias
        assert z.dtype == half
        assert y.dtype == torch.promote_types(half, weight_dtype)
        assert torch.equal(y, expected)


@each_half
def test_an_offset_keeps_the_digits_of_the_weight(half: torch.dtype) -> None:
    """1 + w in half precision would be 1 for each of these."""
    layer = normwise.LayerNorm(32, bias=False, offset=1.0, dtype=half)
    with torch.no_grad():
        layer.weight.fill_(torch.finfo(half).eps / 4)
    x = draws(32, half)[0]
    exact = F.layer_norm(x.double(), (32,), 1 + layer.weight.double())
    assert torch.equal((1 + layer.weight), torch.ones(32, dtype=half))
    assert_close(layer(x), exact, count=32)
    plain = F.layer_norm(x.double(), (32,)).to(half)
    assert not torch.equal(layer(x), plain)


def test_nemotron_s_layer_norm() -> None:
    theirs = randomize(LayerNorm1P(24))
    ours = normwise.LayerNorm(24, offset=1.0)
    ours.load_state_dict(theirs.state_dict())
    x, upstream = torch.randn(5, 24), torch.randn(5, 24)
    for kind, a, b in zip(
        ("forward", "grad", "grad", "grad"), results(ours, x, upstream), results(theirs, x, upstream), strict=True
    ):
        assert_close(a, b, kind=kind, count=24)


MAKE: list[Callable[..., nn.Module]] = [
    lambda **more: normwise.LayerNorm(6, **more),
    lambda **more: normwise.RMSNorm(6, 1e-3, **more),
]
each_norm = pytest.mark.parametrize("make", MAKE, ids=["layer", "rms"])
each_option = pytest.mark.parametrize(
    "options", [{"offset": 1.0}, {"cast": "input"}, {"offset": -0.5, "cast": "input"}], ids=str
)


def plain_of(make: Callable[..., nn.Module], layer: nn.Module, **more: Any) -> nn.Module:
    """The layer without an option whose weight is the gain."""
    plain = make(dtype=layer.weight.dtype, **more)
    plain.load_state_dict({n: t + layer.offset if n == "weight" else t for n, t in layer.state_dict().items()})
    return plain


@each_norm
@each_option
@pytest.mark.parametrize("backend", ["chosen", "kernels", "no kernels", "reference"])
@pytest.mark.parametrize("call", ["mask", "elements", "lengths", "add", "act", "packed", "jagged"])
def test_with_all_else(make: Callable[..., nn.Module], options: Any, backend: str, call: str) -> None:
    """As the layer whose weight is the gain, in results and gradients."""
    if call == "elements" and backend == "kernels":
        pytest.skip("the kernels take one mask for all features")
    more: dict[str, Any] = {"act": "gelu"} if call == "act" else {"dim": 1} if call == "lengths" else {}
    layer = randomize(make(dtype=torch.float64, **more, **options))
    plain = plain_of(make, layer, **more)
    x = torch.randn((3, 6, 4) if call == "lengths" else (3, 4, 6), dtype=torch.float64, requires_grad=True)
    r = torch.randn_like(x, requires_grad=True)
    kwargs: dict[str, Any] = {}
    if call == "mask":
        kwargs["mask"] = torch.tensor([[True, True, False, True], [False] * 4, [True] * 4])
    elif call == "elements":
        kwargs["mask"] = torch.rand(x.shape) < 0.7
    elif call == "lengths":
        kwargs["lengths"] = torch.tensor([2, 0, 4])
    elif call == "add":
        kwargs["add"] = r

    def run(layer: nn.Module) -> list[Tensor]:
        given: Any = x
        if call == "packed":
            given = pack_sequence([x[0], x[1, :3], x[2, :1]])
        elif call == "jagged":
            given = torch.nested.as_nested_tensor([x[0], x[1, :3], x[2, :1]], layout=torch.jagged)
        y = layer(given, **kwargs)
        if call == "packed":
            y = y.data
        elif call == "jagged":
            y = y.values()
        outputs = list(y) if isinstance(y, tuple) else [y]
        torch.manual_seed(1)
        upstream = [torch.randn_like(t) for t in outputs]
        leaves = [x, *([r] if call == "add" else []), *layer.parameters()]
        return [*outputs, *torch.autograd.grad(outputs, leaves, upstream)]

    with using(backend):
        actual = run(layer)
    for got, expected in zip(actual, run(plain), strict=True):
        assert_close(got, expected, kind="grad", count=24)


@each_half
@pytest.mark.parametrize("options", [{"offset": 1.0}, {"cast": "input"}], ids=str)
def test_padding_of_half_precision_is_0_and_gets_no_gradient(options: Any, half: torch.dtype) -> None:
    layer = randomize(normwise.LayerNorm(6, **options, act="silu", dtype=half))
    mask = torch.tensor([[True, False, True], [False, True, True]])
    spoilt = torch.full((2, 3, 6), math.nan, dtype=half)
    x = torch.where(mask[..., None], torch.randn(2, 3, 6).to(half), spoilt).requires_grad_()
    upstream = torch.where(mask[..., None], torch.randn(2, 3, 6).to(half), spoilt)
    y = layer(x, mask=mask)
    grads = torch.autograd.grad(y, [x, *layer.parameters()], upstream)
    assert not y[~mask].any()
    assert not grads[0][~mask].any()
    assert all(grad.isfinite().all() for grad in grads)


@each_half
@pytest.mark.parametrize("options", [{"offset": 1.0}, {"cast": "input"}], ids=str)
def test_the_models_operations_are_chosen_for_half_precision_only(options: Any, half: torch.dtype) -> None:
    x = torch.randn(4, 64)
    layer = normwise.RMSNorm(64, **options)
    with ran() as found:
        layer.to(half)(x.to(half))
    assert found == {"aten"}
    if half == torch.bfloat16:
        with using("kernels"):  # whoever wants the kernel's speed forces it
            assert_close(layer(x.to(half)), F.rms_norm(x.to(half).double(), (64,)), count=64, kind="composed")
    with using("kernels"):
        layer.float()(x)


@each_norm
@pytest.mark.parametrize("backend", ["chosen", "kernels", "aten", "reference"])
def test_derivatives_of_a_gain_behind_the_rounding(
    make: Callable[..., nn.Module], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, where it makes no difference and is left to the norm itself unless it is told otherwise."""
    monkeypatch.setattr(gain, "follows_rounding", lambda *_: True)
    layer = randomize(make(offset=0.5, cast="input", act="silu", dtype=torch.float64))
    x, r = (torch.randn(3, 2, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mask = torch.tensor([[True, False], [True, True], [False, True]])

    def f(x: Tensor, r: Tensor, weight: Tensor) -> Any:
        return torch.func.functional_call(layer, {"weight": weight}, (x,), {"add": r, "mask": mask})

    leaves = (x, r, layer.weight.detach().requires_grad_())
    with using(backend):
        assert torch.autograd.gradcheck(f, leaves)
        assert torch.autograd.gradgradcheck(f, leaves)


@each_half
@pytest.mark.parametrize("options", [{"offset": 1.0}, {"cast": "input"}], ids=str)
def test_vmap_of_half_precision(options: Any, half: torch.dtype) -> None:
    layer = randomize(normwise.RMSNorm(64, 1e-6, **options, dtype=half))
    x = draws(64, half)[0]
    assert torch.equal(torch.vmap(layer)(x), layer(x))


def test_a_kernel_rounds_few_results_to_the_neighbour() -> None:
    """What forcing it costs: another order of the sum, and no more."""
    x = torch.randn(1024, 2048).bfloat16()
    layer = normwise.RMSNorm(2048, 1e-6, cast="input", dtype=torch.bfloat16)
    with using("kernels"):
        y = layer(x)
    expected = layer(x)
    other = y != expected
    assert other.double().mean() < 1e-4
    steps = y.view(torch.int16)[other].int() - expected.view(torch.int16)[other].int()
    assert (steps.abs() == 1).all()


def test_squares_that_overflow_are_not_made_zeros() -> None:
    x = torch.full((2, 8), 1e30, dtype=torch.bfloat16)
    assert not LlamaRMSNorm(8)(x).any()
    for options in ({"offset": 1.0}, {"cast": "input"}):
        assert normwise.RMSNorm(8, **options)(x).isnan().all()


@each_norm
@each_option
def test_a_fresh_layer_has_gain_1(make: Callable[..., nn.Module], options: Any) -> None:
    layer = make(**options)
    x = torch.randn(3, 6)
    expected = make()(x)
    assert_close(layer(x), expected, count=6)
    assert torch.equal(layer.weight, torch.full((6,), 1 - options.get("offset", 0.0)))
    randomize(layer)
    layer.reset_parameters()
    assert_close(layer(x), expected, count=6)
    bare = make(elementwise_affine=False, **options)
    assert_close(bare(x), expected, count=6)


@each_norm
def test_repr_copies_and_state(make: Callable[..., nn.Module]) -> None:
    layer = randomize(make(offset=1.0, cast="input"))
    assert repr(layer).endswith(", offset=1.0, cast='input')")
    assert not any(word in repr(make()) for word in ("offset", "cast"))
    x = torch.randn(3, 6).bfloat16()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert (other.offset, other.cast) == (1.0, "input")
        assert torch.equal(other(x), layer(x))
    assert layer.state_dict().keys() == make().state_dict().keys()
    old = make()
    del old.offset, old.cast  # as pickled before there were these
    assert torch.equal(old(x), make()(x))


@each_norm
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"offset": "1"}, TypeError, "offset must be a number, but got str"),
        ({"offset": True}, TypeError, "offset must be a number, but got bool"),
        ({"offset": torch.ones(6)}, TypeError, "but got Tensor.*belongs into the weight"),
        ({"offset": math.nan}, ValueError, "offset must be finite, but got nan"),
        ({"cast": "float32"}, ValueError, "unknown cast 'float32': expected 'output' .*, 'input' .* or None"),
    ],
    ids=str,
)
def test_what_is_refused(make: Callable[..., nn.Module], options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(**options)
    with pytest.raises(error, match=message):
        normwise.functional.layer_norm(torch.randn(3, 6), (6,), torch.ones(6), **options)
    with pytest.raises(error, match=message):
        normwise.functional.rms_norm(torch.randn(3, 6), (6,), torch.ones(6), **options)


@pytest.mark.parametrize("options", [{"offset": 1.0}, {"cast": "input"}], ids=str)
@pytest.mark.parametrize("half", [False, True])
def test_wrong_weights_are_named(options: Any, half: bool) -> None:
    x = torch.randn(3, 6)
    x = x.bfloat16() if half else x
    with pytest.raises(normwise.ShapeError, match="Expected weight to be of same shape as normalized_shape"):
        normwise.functional.rms_norm(x, (6,), torch.ones(5), **options)
    with pytest.raises(TypeError, match="weight must be of a floating dtype"):
        normwise.functional.rms_norm(x, (6,), torch.ones(6, dtype=torch.int64), **options)


def test_tools_that_take_the_weight_for_the_gain_get_no_eps() -> None:
    """In evaluation nn.TransformerEncoderLayer hands its norms' tensors and eps to one kernel."""
    encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).eval()
    encoder.norm1 = normwise.LayerNorm(8, offset=1.0)
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"with offset=1.0 hides its eps.*vars\(layer\)"):
        encoder(torch.randn(2, 5, 8))
    assert "eps" not in dir(encoder.norm1)
    encoder.norm1 = normwise.LayerNorm(8, cast="input")
    with torch.no_grad():
        encoder(torch.randn(2, 5, 8))


def test_a_traced_graph_keeps_the_options() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor, weight: Tensor) -> Any:
            return normwise.functional.rms_norm(x, (6,), weight, 1e-6, offset=1.0, cast="input")

    graph = torch.fx.symbolic_trace(Model())
    x, weight = torch.randn(3, 6).bfloat16(), torch.randn(6)
    assert torch.equal(graph(x, weight), Model()(x, weight))
    assert graph(x, weight).dtype == torch.float32


@each_half
@pytest.mark.parametrize("name", ["Llama", "Gemma"])
def test_compiled_as_the_models_are(name: str, half: torch.dtype) -> None:
    """Operation for operation: by a compiler that fuses nothing, the same bits."""
    theirs, ours = carried(name, 64, half, half)
    x = draws(64, half)[0]
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), theirs(x))
