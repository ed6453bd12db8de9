"""accumulate=N: statistics of the present and the last N - 1 micro-batches."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.checkpoint import checkpoint

import normwise
from norm_cases import randomize, run
from tolerances import assert_close

SHAPES = {"1d": (4, 3), "1d steps": (2, 3, 5), "2d": (2, 3, 4, 2), "3d": (2, 3, 2, 3, 2)}


def build(
    name: str = "1d", accumulate: int | None = 3, dtype: torch.dtype = torch.float64, **kwargs: object
) -> nn.Module:
    return randomize(getattr(normwise, f"BatchNorm{name[:2]}")(3, accumulate=accumulate, dtype=dtype, **kwargs))


def by_hand(layer: nn.Module, x: Tensor, earlier: list[Tensor]) -> Tensor:
    """The formula over all values, the earlier ones constant."""
    values = torch.cat([t.transpose(0, 1).flatten(1) for t in [x, *(e.detach() for e in earlier)]], 1)
    shape = (1, 3, *(1,) * (x.dim() - 2))
    mean, var = values.mean(1).view(shape), values.var(1, correction=0).view(shape)
    return (x - mean) / (var + layer.eps).sqrt() * layer.weight.view(shape) + layer.bias.view(shape)


@pytest.mark.parametrize("name", SHAPES)
def test_pools_the_last_batches(name: str) -> None:
    layer = build(name)
    batches = [torch.randn(SHAPES[name], dtype=torch.float64) * (i + 1) + i for i in range(5)]
    mean, var = layer.running_mean.clone(), layer.running_var.clone()
    for i, x in enumerate(batches):
        window = batches[max(0, i - 2) : i]
        upstream = torch.randn_like(x)
        leaf = x.clone().requires_grad_()
        y = by_hand(layer, leaf, window)
        expected = torch.autograd.grad(y, [leaf, layer.weight, layer.bias], upstream)
        actual = run(layer, x, upstream)
        assert_close(actual["output"], y, kind="composed")
        for key, right in zip(("input", "weight", "bias"), expected, strict=True):
            assert_close(actual[f"grad {key}"], right, kind="grad", name=key)
        values = torch.cat([t.transpose(0, 1).flatten(1) for t in [x, *window]], 1)
        mean, var = (0.9 * old + 0.1 * new for old, new in ((mean, values.mean(1)), (var, values.var(1))))
        assert_close(layer.running_mean, mean)
        assert_close(layer.running_var, var)


def test_one_micro_batch_is_batch_norm() -> None:
    ours, plain = build(accumulate=1), nn.BatchNorm1d(3, dtype=torch.float64)
    plain.load_state_dict(ours.state_dict())
    for _ in range(2):
        x, upstream = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
        expected, actual = run(plain, x, upstream), run(ours, x, upstream)
        for key, right in expected.items():
            assert_close(actual[key].double(), right.double(), kind="grad", name=key)
    torch.testing.assert_close(ours.eval()(x), plain.eval()(x))


def test_padding_ragged_input_and_single_values() -> None:
    layer = build("1d steps", act="relu")
    other = copy.deepcopy(layer)
    lengths = torch.tensor([5, 1])
    valid = torch.arange(5) < lengths[:, None]
    for i in range(3):
        x = torch.randn(2, 3, 5, dtype=torch.float64)
        y = layer(x.masked_fill(~valid[:, None], torch.nan), lengths=lengths)
        packed = other(pack_sequence([part.T[:n] for part, n in zip(x, lengths, strict=True)], enforce_sorted=False))
        parts = torch.nn.utils.rnn.unpack_sequence(packed)
        assert_close(y.mT[valid], torch.cat(parts), kind="composed", name=str(i))
        assert not y.mT[~valid].any()
    torch.testing.assert_close(layer.state_dict(), other.state_dict())
    rows = build()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        rows(torch.randn(1, 3, dtype=torch.float64))
    first = torch.randn(4, 3, dtype=torch.float64)
    rows(first)
    one = torch.randn(1, 3, dtype=torch.float64)
    assert_close(rows(one), by_hand(rows, one, [first]), kind="composed")


def test_a_spoilt_batch_is_forgotten() -> None:
    layer = build(dtype=torch.float32)
    x = [torch.randn(4, 3) for _ in range(3)]
    layer(x[0])
    with pytest.warns(UserWarning, match="left a batch out"):
        layer(x[1] * torch.nan)
    assert_close(layer(x[2]), by_hand(layer, x[2].double(), [x[0].double()]), kind="composed", count=8)
    assert (layer.num_batches_tracked, layer.num_batches_skipped) == (2, 1)
    layer.reset_running_stats()
    assert_close(layer(x[0]), by_hand(layer, x[0].double(), []), kind="composed", count=4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool) -> None:
    layer = build()
    other = copy.deepcopy(layer)
    for _ in range(3):
        x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
        upstream = torch.randn(4, 3, dtype=torch.float64)
        checkpoint(layer, x, use_reentrant=reentrant).backward(upstream)
        (expected,) = torch.autograd.grad(other(x), x, upstream)
        assert_close(x.grad, expected, kind="grad")
    torch.testing.assert_close(layer.state_dict(), other.state_dict())


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="accumulate must be at least 1"):
        normwise.BatchNorm1d(3, accumulate=0)
    with pytest.raises(ValueError, match="give one of them"):
        normwise.BatchNorm1d(3, accumulate=2, virtual_batch_size=2)
    with pytest.raises(ValueError, match="the model has accumulate=2"):
        normwise.accumulated_backward(normwise.BatchNorm1d(2, accumulate=2), [1], lambda _: torch.ones(()))
    assert "accumulate=3" in repr(build())


def test_compiled() -> None:
    torch._dynamo.reset()
    layer = build(dtype=torch.float32)
    other = copy.deepcopy(layer)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    for _ in range(4):
        x, upstream = torch.randn(4, 3), torch.randn(4, 3)
        expected, actual = run(layer, x, upstream), run(compiled, x, upstream)
        for right, got in zip(expected.values(), actual.values(), strict=True):
            assert_close(got.double(), right.double(), kind="grad", dtype=torch.float32, count=12, scale=10.0)
