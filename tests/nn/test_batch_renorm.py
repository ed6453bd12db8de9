"""BatchRenorm: its formula, its limits, and where it meets BatchNorm."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.checkpoint import checkpoint

import normwise
from normwise.backends import reference
from normwise.nn.construct import eps_of
from support.backends import each_backend_and_dtype, using
from support.norm_cases import randomize, run
from support.tolerances import assert_close

SHAPES = {"1d": (6, 4), "1d steps": (3, 4, 5), "2d": (3, 4, 5, 2), "3d": (2, 4, 3, 2, 2)}
each_shape = pytest.mark.parametrize("name", SHAPES)


def layer_for(name: str, r_max: object = 1.5, d_max: object = 0.5, **kwargs: object) -> nn.Module:
    kwargs.setdefault("dtype", torch.float64)
    return randomize(getattr(normwise, f"BatchRenorm{name[:2]}")(4, r_max=r_max, d_max=d_max, **kwargs))


def truth(layer: nn.Module, x: Tensor, valid: Tensor | None = None) -> Tensor:
    """By the reference, with the layer's state as it is."""
    shape = (1, -1, *(1,) * (x.dim() - 2))
    return reference.batch_renorm(
        x,
        (0, *range(2, x.dim())),
        *(t.view(shape) for t in (layer.weight, layer.bias)),
        mask=valid,
        mean=layer.running_mean.view(shape),
        var=layer.running_var.view(shape),
        r_max=layer.r_max,
        d_max=layer.d_max,
        eps=eps_of(layer),
    )[0]


@each_shape
@each_backend_and_dtype()
def test_equals_the_reference(name: str, backend: str, dtype: torch.dtype, device: torch.device) -> None:
    layer = layer_for(name, dtype=torch.float64 if dtype == torch.float64 else torch.float32, device=device)
    x = torch.randn(SHAPES[name], dtype=torch.float64, device=device).mul(2).add(1).to(dtype)
    upstream = torch.randn_like(x)
    exact = copy.deepcopy(layer).double()
    leaf = x.double().requires_grad_()
    y = truth(exact, leaf)
    expected = [y.detach(), *torch.autograd.grad(y, [leaf, exact.weight, exact.bias], upstream.double())]
    plain = nn.BatchNorm1d(4, momentum=0.01, device=device, dtype=torch.float64)
    plain.load_state_dict(layer.state_dict())
    plain(x.double().transpose(0, 1).flatten(1).T)
    with using(backend):
        actual = run(layer, x, upstream)
    for key, right in zip(["output", "grad input", "grad weight", "grad bias"], expected, strict=True):
        kind = "grad" if key.startswith("grad") else "forward"
        scale = max(1.0, right.abs().max().item())
        assert_close(actual[key], right, kind=kind, dtype=dtype, count=x.numel(), scale=scale, name=key)
    for key, right in plain.state_dict().items():  # the averages move as BatchNorm's do
        if key.startswith("running"):
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            assert_close(actual[key], right, dtype=wide, count=x.numel(), scale=4.0, name=key)


@each_shape
def test_without_correction_it_is_batch_norm(name: str) -> None:
    ours = layer_for(name, r_max=1, d_max=0, momentum=0.1)
    plain = getattr(nn, f"BatchNorm{name[:2]}")(4, dtype=torch.float64)
    assert list(ours.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(SHAPES[name], dtype=torch.float64)
    upstream = torch.randn_like(x)
    actual, expected = run(ours, x, upstream), run(plain, x, upstream)
    for key, right in expected.items():
        assert_close(actual[key].double(), right.double(), kind="grad", name=key)
    torch.testing.assert_close(ours.eval()(x), plain.eval()(x))


@each_shape
def test_without_limits_training_computes_what_evaluation_does(name: str) -> None:
    layer = layer_for(name, r_max=1e9, d_max=1e9)
    x = torch.randn(SHAPES[name], dtype=torch.float64) * 3 + 1
    evaluated = copy.deepcopy(layer).eval()(x)
    assert_close(layer(x), evaluated, kind="composed")


def test_r_and_d_by_hand() -> None:
    """One channel with 1, 3 (mean 2, deviation 1) beside running mean 0 and deviation 4, and half of it allowed."""
    layer = normwise.BatchRenorm1d(1, eps=1e-12, r_max=2, d_max=1 / 3, affine=False, dtype=torch.float64)
    layer.running_var.fill_(16)
    y = layer(torch.tensor([[1.0], [3.0]], dtype=torch.float64))
    # sigma_B / sigma = 1/4 is clipped to 1/2, (2 - 0) / 4 to 1/3.
    assert_close(y, torch.tensor([[-0.5 + 1 / 3], [0.5 + 1 / 3]], dtype=torch.float64), kind="composed")


def test_gradcheck() -> None:
    """r and d are constants for the gradient: a numerical derivative holds them too."""
    layer = layer_for("1d", momentum=0.0)
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    dims, shape = (0,), (1, 4)
    moments = reference.moments(x.detach(), dims)
    mean, var = layer.running_mean.view(shape), layer.running_var.view(shape)
    r, d = reference.renorm_correction(moments, mean, var, 1.5, 0.5, layer.eps)

    def held(x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
        z, _ = reference.norm(x, dims, eps=layer.eps)
        return (z * r + d) * gain + shift

    inputs = (x, layer.weight, layer.bias)
    assert torch.autograd.gradcheck(held, inputs)
    upstream = torch.randn(5, 4, dtype=torch.float64)
    expected = torch.autograd.grad(held(*inputs), inputs, upstream)
    for got, right in zip(torch.autograd.grad(layer(x), inputs, upstream), expected, strict=True):
        assert_close(got, right, kind="grad")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["chosen", "no kernels", "reference"])
def test_a_batch_of_one_stands_on_the_running_averages(dtype: torch.dtype, backend: str) -> None:
    layer = layer_for("1d", r_max=3, d_max=5, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    mean, var = layer.running_mean.clone(), layer.running_var.clone()
    x = torch.randn(1, 4).to(dtype).requires_grad_()
    with using(backend):
        y = layer(x)
    z = ((x.detach().double() - mean) / (var.double() + layer.eps).sqrt()).clamp(-5, 5)
    assert_close(y, z * layer.weight.double() + layer.bias.double(), kind="composed", dtype=dtype, scale=5.0)
    (grad,) = torch.autograd.grad(y, x, torch.randn_like(y))
    # One channel's gradient less its own mean, times a gain of up to 3 / sqrt(eps).
    assert_close(grad, torch.zeros_like(grad), kind="grad", scale=1e3)
    assert_close(layer.running_mean, mean.double() * 0.99 + 0.01 * x.detach().double()[0], dtype=torch.float32)
    assert torch.equal(layer.running_var, var)
    assert layer.num_batches_tracked == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n", [1, 4])
def test_a_layer_in_half_precision_is_the_float32_layer_rounded(n: int, dtype: torch.dtype) -> None:
    """As model.half() makes it: parameters and running averages in half precision too."""
    half = normwise.BatchRenorm2d(3, r_max=2, d_max=1).to(dtype)
    wide = copy.deepcopy(half).float()
    x = torch.randn(n, 3, 4, 4, dtype=dtype)
    assert_close(half(x), wide(x.float()).to(dtype))
    for name in ("running_mean", "running_var"):
        assert half.get_buffer(name).dtype is dtype
        assert_close(half.get_buffer(name), wide.get_buffer(name).to(dtype))


def test_limits_follow_the_step() -> None:
    layer = normwise.BatchRenorm1d(2)
    assert (layer.r_max(0), layer.r_max(5_000), layer.r_max(22_500), layer.r_max(90_000)) == (1, 1, 2, 3)
    assert (layer.d_max(5_000), layer.d_max(15_000), layer.d_max(25_000)) == (0, 2.5, 5)
    assert torch.equal(layer.r_max(torch.tensor(22_500)), torch.tensor(2.0))
    seen: list[int] = []

    def limit(step: int) -> float:
        seen.append(step)
        return 1 + step

    layer = normwise.BatchRenorm1d(2, r_max=limit, d_max=0)
    for _ in range(3):
        layer(torch.randn(4, 2))
    layer.eval()(torch.randn(4, 2))
    assert seen == [0, 1, 2]


def test_padding_act_residual_and_ragged_input() -> None:
    lengths = torch.tensor([5, 1, 3])
    valid = (torch.arange(5) < lengths[:, None])[:, None]
    x, r = (torch.randn(3, 4, 5, dtype=torch.float64) for _ in range(2))
    layer = layer_for("1d", act="relu")
    state = copy.deepcopy(layer.state_dict())
    expected = torch.relu(truth(layer, x, valid) + r).masked_fill(~valid, 0)
    spoilt = x.masked_fill(~valid, torch.nan)
    assert_close(layer(spoilt, residual=r, lengths=lengths), expected, kind="composed")
    after = copy.deepcopy(layer.state_dict())
    layer.load_state_dict(state)
    assert_close(layer(spoilt, residual=r, mask=valid.expand_as(x)), expected, kind="composed")
    layer.load_state_dict(state)
    parts = [part.T[:n] for part, n in zip(x, lengths, strict=True)]
    packed = layer(pack_sequence(parts, enforce_sorted=False))
    rows = torch.relu(truth(layer_from(state), torch.cat(parts)))
    assert_close(torch.cat(torch.nn.utils.rnn.unpack_sequence(packed)), rows, kind="composed")
    for key, right in after.items():
        assert_close(layer.state_dict()[key].double(), right.double(), name=key)


def layer_from(state: dict[str, Tensor]) -> nn.Module:
    layer = layer_for("1d")
    layer.load_state_dict(state)
    return layer


@pytest.mark.parametrize("reentrant", [False, True])
def test_inside_a_checkpoint_it_is_refused(reentrant: bool) -> None:
    """The averages that r and d came from have moved between the two runs."""
    layer = layer_for("1d")
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    y = checkpoint(layer, x, use_reentrant=reentrant)
    with pytest.raises(RuntimeError, match="leave this layer outside of the checkpoint"):
        y.backward(torch.randn_like(y))


def test_compiles_in_one_graph() -> None:
    torch._dynamo.reset()
    layer, other = normwise.BatchRenorm1d(4), normwise.BatchRenorm1d(4)
    for each in (layer, other):
        each.num_batches_tracked.fill_(15_000)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        x, upstream = torch.randn(6, 4), torch.randn(6, 4)
        actual, expected = run(compiled, x, upstream), run(layer, x, upstream)
        for got, right in zip(actual.values(), expected.values(), strict=True):
            assert_close(got.double(), right.double(), kind="grad", dtype=torch.float32, count=6)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="r_max must be at least 1"):
        normwise.BatchRenorm1d(4, r_max=0.5)
    with pytest.raises(ValueError, match="d_max must be at least 0"):
        normwise.BatchRenorm1d(4, d_max=-1.0)
    with pytest.raises(ValueError, match="needs track_running_stats=True"):
        normwise.BatchRenorm1d(4, track_running_stats=False)
    with pytest.raises(ValueError, match="0 <= first < last"):
        normwise.LinearRamp(1, 3, 10, 10)
    layer = layer_for("1d")
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match="no valid element"):
        layer(torch.randn(2, 4, 3, dtype=torch.float64), lengths=torch.tensor([0, 0]))
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)
