"""GroupNorm and InstanceNorm beyond torch.nn: activation, residual, memory layouts, ragged inputs."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence, unpack_sequence

import normwise
from support.backends import BACKENDS, using
from support.kernel_truth import ACTIVATIONS, FURTHER_ACTS
from support.norm_cases import randomize, run
from support.tolerances import assert_close

ACTS: dict[str | None, Callable[[Tensor], Tensor]] = {None: lambda z: z, **ACTIVATIONS}
Make = Callable[..., nn.Module]
LAYERS: dict[str, tuple[Make, Make]] = {
    "group": (
        lambda **more: normwise.GroupNorm(2, 4, **more),
        lambda **more: nn.GroupNorm(2, 4, **more),
    ),
    "group, no gain": (
        lambda **more: normwise.GroupNorm(1, 4, affine=False, **more),
        lambda **more: nn.GroupNorm(1, 4, affine=False, **more),
    ),
    "instance": (
        lambda **more: normwise.InstanceNorm2d(4, affine=True, **more),
        lambda **more: nn.InstanceNorm2d(4, affine=True, **more),
    ),
    "instance, tracked": (
        lambda **more: normwise.InstanceNorm2d(4, track_running_stats=True, **more),
        lambda **more: nn.InstanceNorm2d(4, track_running_stats=True, **more),
    ),
}
each_layer = pytest.mark.parametrize("name", LAYERS)
each_layout = pytest.mark.parametrize(
    "layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels-last"]
)


def pair(name: str, dtype: torch.dtype = torch.float64, act: str | None = None) -> tuple[nn.Module, nn.Module]:
    """Ours and torch's, with the same random numbers inside."""
    ours, theirs = LAYERS[name]
    layer, plain = randomize(ours(act=act, dtype=dtype)), theirs(dtype=dtype)
    plain.load_state_dict(layer.state_dict())
    return layer, plain


@pytest.mark.parametrize("act", [act for act in ACTS if act not in FURTHER_ACTS])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("backend", BACKENDS)
@each_layer
@each_layout
def test_act_and_residual(
    name: str, act: str | None, training: bool, backend: str, layout: torch.memory_format
) -> None:
    """act(norm(x) + residual), as BatchNorm's, on every backend and in both layouts."""
    layer, plain = (m.train(training) for m in pair(name, act=act))
    x, r = (torch.randn(3, 4, 5, 2, dtype=torch.float64).to(memory_format=layout) for _ in range(2))
    x.requires_grad_()
    r.requires_grad_()
    for with_residual in (False, True):
        leaves = [x, r] if with_residual else [x]
        with using(backend):
            y = layer(x, residual=r) if with_residual else layer(x)
        truth = ACTS[act](plain(x) + r if with_residual else plain(x))
        assert_close(y, truth)
        if backend in ("chosen", "kernels"):
            assert y.is_contiguous(memory_format=layout)
        upstream = torch.randn_like(y)
        for got, expected in zip(
            torch.autograd.grad(y, [*leaves, *layer.parameters()], upstream),
            torch.autograd.grad(truth, [*leaves, *plain.parameters()], upstream),
            strict=True,
        ):
            assert_close(got, expected, kind="grad")
    for key, value in plain.state_dict().items():
        assert_close(layer.state_dict()[key].double(), value, name=key)


@pytest.mark.parametrize("act", FURTHER_ACTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_further_acts_and_residual(act: str, backend: str) -> None:
    test_act_and_residual("group", act, True, backend, torch.channels_last)


@pytest.mark.parametrize("shape", [(3, 4, 7), (3, 4, 5, 6), (2, 4, 3, 2, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_channels_last_of_any_rank(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """One result, whether the channels lie last in memory or not, and it lies as the input does."""
    layer = randomize(normwise.GroupNorm(2, 4, act="silu"))
    x, upstream = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    last = x.movedim(1, -1).contiguous().movedim(-1, 1)
    first, other = run(layer, x, upstream), run(layer, last, upstream)
    assert other["output"].stride() == other["grad input"].stride() == last.stride()
    for key, value in first.items():
        # The order of sums differs; in bfloat16 that can decide a rounding.
        assert_close(other[key], value, kind="composed", count=upstream[:, 0].numel(), name=key)


@each_layer
def test_padding_stays_out_beside_a_residual(name: str) -> None:
    """The truth: each sample's valid columns alone, by torch.nn."""
    layer, plain = pair(name, act="gelu")
    plain.eval()  # running averages: those that there are
    layer.eval()
    x, r = (torch.randn(3, 4, 2, 6, dtype=torch.float64) for _ in range(2))
    lengths = torch.tensor([6, 2, 4])
    padding = (torch.arange(6) >= lengths[:, None]).view(3, 1, 1, 6).expand_as(x)
    spoilt, added = x.masked_fill(padding, float("nan")), r.masked_fill(padding, float("inf"))
    spoilt.requires_grad_()
    added.requires_grad_()
    y = layer(spoilt, residual=added, lengths=lengths)
    assert not y[padding].any()
    for grad in torch.autograd.grad(y, (spoilt, added), torch.randn_like(y)):
        assert not grad[padding].any()
        assert grad[~padding].all()
    for i, n in enumerate(lengths.tolist()):
        alone = F.gelu(plain(x[i : i + 1, ..., :n]) + r[i : i + 1, ..., :n])
        assert_close(y[i, ..., :n], alone[0])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("act", [None, "silu"])
@pytest.mark.parametrize("name", ["group", "instance"])
@each_layout
def test_gradients_of_both_orders_pass_gradcheck(
    name: str, act: str | None, masked: bool, layout: torch.memory_format
) -> None:
    layer = pair(name, act=act)[0]
    x, r = (torch.randn(2, 4, 2, 3, dtype=torch.float64).to(memory_format=layout).requires_grad_() for _ in range(2))
    mask = torch.tensor([[True, False, True], [True, True, True]]).view(2, 1, 3) if masked else None

    def f(x: Tensor, r: Tensor, *_: Tensor) -> Tensor:
        return layer(x, residual=r, mask=None if mask is None else mask.expand(2, 2, 3))

    assert torch.autograd.gradcheck(f, (x, r, *layer.parameters()))
    assert torch.autograd.gradgradcheck(f, (x, r))
    y = f(x, r)
    upstream, leaves = torch.randn_like(y), [x, r, *layer.parameters()]
    plain = torch.autograd.grad(y, leaves, upstream, retain_graph=True)
    for got, expected in zip(torch.autograd.grad(y, leaves, upstream, create_graph=True), plain, strict=True):
        assert_close(got, expected, kind="grad")


def test_a_residual_of_another_dtype_is_added_as_torch_does() -> None:
    layer, plain = pair("group", torch.float32, "relu")
    x, r = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3, dtype=torch.float64)
    y = layer(x, residual=r)
    assert y.dtype == torch.float64
    assert_close(y, torch.relu(plain(x) + r), dtype=torch.float32)


@pytest.mark.parametrize("name", ["group", "instance"])
def test_layers_pickled_before_there_was_an_activation(name: str) -> None:
    layer, plain = pair(name)
    state = layer.__getstate__()
    del state["act"]
    old = type(layer).__new__(type(layer))
    old.__setstate__(state)
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    assert_close(old(x), plain(x))
    assert "act" not in repr(old)
    assert "act='silu'" in repr(pickle.loads(pickle.dumps(pair(name, act="silu")[0])))


@pytest.mark.parametrize("kind", ["packed", "jagged", "jagged along the last axis"])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (lambda: normwise.GroupNorm(2, 4, act="silu", dtype=torch.float64), nn.GroupNorm(2, 4, dtype=torch.float64)),
        (
            lambda: normwise.InstanceNorm1d(4, affine=True, act="silu", dtype=torch.float64),
            nn.InstanceNorm1d(4, affine=True, dtype=torch.float64),
        ),
    ],
    ids=["group", "instance"],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_ragged_input_matches_each_sequence(
    kind: str, with_residual: bool, ours: Callable[[], nn.Module], theirs: nn.Module
) -> None:
    """The truth: each sequence alone."""
    layer = randomize(ours())
    theirs.load_state_dict(layer.state_dict())
    parts, added = (
        [torch.randn(n, 4, dtype=torch.float64, requires_grad=True) for n in (3, 5, 2, 5)] for _ in range(2)
    )

    def wrapped(sequences: list[Tensor]):
        if kind == "packed":
            return pack_sequence(sequences, enforce_sorted=False)
        nested = torch.nested.as_nested_tensor(sequences, layout=torch.jagged)
        return nested.transpose(1, 2) if kind == "jagged along the last axis" else nested

    x = wrapped(parts)
    # Another jagged tensor has a length of its own: the residual must be of the input's.
    r = wrapped(added) if kind == "packed" else x * 2
    y = layer(x, residual=r) if with_residual else layer(x)
    if kind == "packed":
        got = unpack_sequence(y)
    else:
        assert y.shape == x.shape
        got = [part.mT if kind == "jagged along the last axis" else part for part in y.unbind()]
    leaves = [*parts, *(added if with_residual and kind == "packed" else []), *layer.parameters()]
    truth = []
    for i, part in enumerate(parts):
        z = theirs(part.mT[None])[0].mT
        if with_residual:
            z = z + (added[i] if kind == "packed" else 2 * part)
        truth.append(F.silu(z))
    assert_close(torch.cat(got), torch.cat(truth))
    upstream = torch.randn_like(torch.cat(truth))
    theirs_leaves = [*leaves[: -len(list(layer.parameters()))], *theirs.parameters()]
    for a, b in zip(
        torch.autograd.grad(torch.cat(got), leaves, upstream),
        torch.autograd.grad(torch.cat(truth), theirs_leaves, upstream),
        strict=True,
    ):
        assert_close(a, b, kind="grad")


def test_ragged_inputs_that_do_not_fit() -> None:
    packed = pack_sequence([torch.randn(3, 4), torch.randn(2, 4)])
    with pytest.raises(ValueError, match="states its own lengths"):
        normwise.GroupNorm(2, 4)(packed, lengths=torch.tensor([3, 2]))
    with pytest.raises(normwise.ShapeError, match=r"num_channels \(6\), but got: 4"):
        normwise.GroupNorm(2, 6)(packed)
    with pytest.raises(normwise.ShapeError, match="InstanceNorm1d does"):
        normwise.InstanceNorm2d(4)(packed)
    with pytest.raises(normwise.ShapeError, match="rows of channels"):
        normwise.GroupNorm(2, 4)(pack_sequence([torch.randn(3, 4, 2)]))
