"""Ghost batch norm: each virtual batch as if it came alone, running averages as if there were none."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

import normwise
from support.backends import BACKENDS, each_backend_and_dtype, using
from support.norm_cases import randomize, run
from support.tolerances import assert_close

SHAPES = {"1d": (12, 3), "1d steps": (12, 3, 5), "2d": (12, 3, 4, 2), "3d": (12, 3, 2, 3, 2)}


def pair(name: str, virtual: int, dtype: torch.dtype = torch.float64, **kwargs: object) -> tuple[nn.Module, nn.Module]:
    """A layer with virtual batches, and torch's with the same state."""
    ours = randomize(getattr(normwise, f"BatchNorm{name[:2]}")(3, virtual_batch_size=virtual, dtype=dtype, **kwargs))
    plain = getattr(nn, f"BatchNorm{name[:2]}")(3, dtype=dtype)
    plain.load_state_dict(ours.state_dict())
    return ours, plain


def one_by_one(plain: nn.Module, x: Tensor, upstream: Tensor, cuts: list[int]) -> list[Tensor]:
    """Output and gradients of torch's layer on each part alone."""
    leaf = x.clone().requires_grad_()
    scratch = copy.deepcopy(plain)
    y = torch.cat([scratch(part) for part in leaf.split(cuts)])
    return [y.detach(), *torch.autograd.grad(y, [leaf, scratch.weight, scratch.bias], upstream)]


KEYS = ["output", "grad input", "grad weight", "grad bias"]


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(
    ("virtual", "cuts"), [(4, [4, 4, 4]), (5, [5, 5, 2]), (12, [12]), (20, [12]), (6, [6, 6]), (3, [3] * 4)]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_each_virtual_batch_as_if_alone(name: str, virtual: int, cuts: list[int], backend: str) -> None:
    ours, plain = pair(name, virtual)
    x = torch.randn(SHAPES[name], dtype=torch.float64) * 2 + 1
    upstream = torch.randn_like(x)
    expected = one_by_one(plain, x, upstream, cuts)
    with using(backend):
        actual = run(ours, x, upstream)
    for key, right in zip(KEYS, expected, strict=True):
        assert_close(actual[key], right, kind="grad", name=key)
    plain(x)  # the whole batch at once
    for key, right in plain.state_dict().items():
        if key in actual and not key.startswith(("weight", "bias")):
            assert_close(actual[key].double(), right.double(), kind="grad", name=key)
    torch.testing.assert_close(ours.eval()(x), plain.eval()(x))


@each_backend_and_dtype(torch.float32, torch.bfloat16, torch.float16)
def test_other_dtypes_match_the_formula(dtype: torch.dtype, backend: str) -> None:
    ours, _ = pair("1d steps", 4, torch.float32)
    exact = copy.deepcopy(ours).double()
    x = torch.randn(14, 3, 5).add(2).to(dtype)
    upstream = torch.randn_like(x)
    expected = run(exact, x.double(), upstream.double())
    with using(backend):
        actual = run(ours, x, upstream)
    for key in KEYS:
        kind = "grad" if key.startswith("grad") else "forward"
        assert_close(actual[key], expected[key], kind=kind, dtype=dtype, count=x.numel(), scale=4.0, name=key)
    for key in ("running_mean", "running_var"):
        assert_close(actual[key], expected[key], count=70, name=key)


def test_a_single_value_joins_the_virtual_batch_before() -> None:
    ours, plain = pair("1d", 4)
    x, upstream = torch.randn(13, 3, dtype=torch.float64), torch.randn(13, 3, dtype=torch.float64)
    expected = one_by_one(plain, x, upstream, [4, 4, 5])
    actual = run(ours, x, upstream)
    for key, right in zip(KEYS, expected, strict=True):
        assert_close(actual[key], right, kind="grad", name=key)
    ours, plain = pair("1d", 4)
    assert_close(ours(x[:5]), plain(x[:5]))


def test_padding_enters_no_virtual_batch() -> None:
    """Lengths of 0 in a whole virtual batch too: it is all 0 and counts for nothing."""
    lengths = torch.tensor([5, 2, 0, 0, 1, 4, 3])
    valid = torch.arange(5) < lengths[:, None]
    ours, plain = pair("1d steps", 2, act="silu")
    x, r = (torch.randn(7, 3, 5, dtype=torch.float64) for _ in range(2))
    y = ours(x.masked_fill(~valid[:, None], torch.nan), residual=r, lengths=lengths)
    for rows in (slice(0, 2), slice(4, 6), slice(6, 7)):
        alone = normwise.BatchNorm1d(3, act="silu", dtype=torch.float64)
        alone.load_state_dict(pair_state(ours))
        assert_close(y[rows], alone(x[rows], residual=r[rows], lengths=lengths[rows]), kind="composed")
    assert not y[2:4].any()
    plain(x.mT[valid])
    for key in ("running_mean", "running_var"):
        assert_close(getattr(ours, key), getattr(plain, key), kind="grad", name=key)


def pair_state(layer: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in layer.state_dict().items()}


def test_cumulative_averages_and_batches_that_are_not_finite() -> None:
    ours = normwise.BatchNorm1d(3, momentum=None, virtual_batch_size=2, dtype=torch.float64)
    plain = nn.BatchNorm1d(3, momentum=None, dtype=torch.float64)
    for _ in range(3):
        x = torch.randn(7, 3, dtype=torch.float64)
        ours(x), plain(x)
        spoilt = x.clone()
        spoilt[5, 1] = torch.inf
        if not ours.num_batches_skipped:
            with pytest.warns(UserWarning, match="skipped an update"):
                ours(spoilt)
        else:
            ours(spoilt)
    assert (ours.num_batches_tracked, ours.num_batches_skipped) == (3, 3)
    for key in ("running_mean", "running_var"):
        assert_close(getattr(ours, key), getattr(plain, key), kind="grad", name=key)


def test_gradcheck() -> None:
    ours, _ = pair("1d steps", 2)
    x = torch.randn(5, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ours, x)
    assert torch.autograd.gradgradcheck(ours, x)


def test_compiles_in_one_graph() -> None:
    torch._dynamo.reset()
    ours, other = (pair("1d steps", 4, torch.float32)[0] for _ in range(2))
    other.load_state_dict(ours.state_dict())
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        x, upstream = torch.randn(10, 3, 5), torch.randn(10, 3, 5)
        expected, actual = run(ours, x, upstream), run(compiled, x, upstream)
        for right, got in zip(expected.values(), actual.values(), strict=True):
            assert_close(got.double(), right.double(), kind="grad", dtype=torch.float32, count=50, scale=10.0)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="virtual_batch_size must be at least 1"):
        normwise.BatchNorm1d(3, virtual_batch_size=0)
    layer = normwise.BatchNorm1d(3, virtual_batch_size=1)
    before = pair_state(layer)
    said = r"more than 1 value per channel.*got input size torch.Size\(\[4, {}.*of virtual_batch_size=1: make it larger"
    with pytest.raises(ValueError, match=said.format(r"3\]\)")):
        layer(torch.randn(4, 3))
    with pytest.raises(ValueError, match=said.format(r"3, 2\]\)")):
        layer(torch.randn(4, 3, 2), lengths=torch.tensor([2, 2, 1, 2]))
    with pytest.raises(ValueError, match="give a padded input with lengths="):
        layer(pack_sequence([torch.randn(2, 3), torch.randn(1, 3)]))
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)
    assert "virtual_batch_size=1" in repr(layer)
