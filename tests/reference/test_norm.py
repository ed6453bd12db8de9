"""The reference: hand-worked numbers, closed forms, gradcheck, and its explicit backward against autograd."""

from __future__ import annotations

import math

import pytest
import torch

from normwise.backends import reference
from support.tolerances import assert_close

SETTINGS = pytest.mark.parametrize(
    ("dims", "weight_shape", "masked", "given", "center"),
    [
        ((0, 2), (1, 3, 1), False, False, True),
        ((0, 2), (1, 3, 1), True, False, True),
        ((0, 2), (1, 3, 1), False, True, True),
        ((0, 2), (1, 3, 1), True, True, True),
        ((2,), (1, 1, 4), False, False, True),
        ((1, 2), (1, 3, 4), True, False, True),
        ((2,), (1, 1, 4), False, False, False),
        ((1, 2), (1, 3, 4), True, False, False),
        ((2,), None, True, False, True),
    ],
)


def arguments(dims, weight_shape, masked, given, center, dtype=torch.float64):
    x = torch.randn(2, 3, 4, dtype=dtype)
    weight = bias = mask = mean = var = None
    if weight_shape is not None:
        weight, bias = torch.randn(weight_shape, dtype=dtype), torch.randn(weight_shape, dtype=dtype)
    if masked:
        mask = torch.tensor([[True, True, False, True], [True, False, False, False]]).unsqueeze(1)
    if given:
        shape = [1 if d in dims else s for d, s in enumerate(x.shape)]
        mean, var = torch.randn(shape, dtype=dtype), torch.rand(shape, dtype=dtype) + 0.5
    return x, weight, bias, {"mask": mask, "mean": mean, "var": var, "eps": 1e-3, "center": center}


def test_moments_by_hand() -> None:
    x = torch.tensor([[1.0, 2.0, 3.0], [5.0, 4.0, 9.0]])
    mean, var, count = reference.moments(x, [0])
    assert mean.tolist() == [[3.0, 3.0, 6.0]]
    assert var.tolist() == [[4.0, 1.0, 9.0]]
    assert count.tolist() == [[2.0]]
    mask = torch.tensor([[True, True, False], [False, True, True]])
    mean, var, count = reference.moments(x, [1], mask)
    assert mean.tolist() == [[1.5], [6.5]]
    assert var.tolist() == [[0.25], [6.25]]
    assert count.tolist() == [[2.0], [2.0]]


def test_norm_by_hand() -> None:
    """Column (1, 5): mean 3, variance 4, so with eps 12 the deviation is 4: (-2/4, 2/4), times 3, plus 1."""
    y, _ = reference.norm(torch.tensor([[1.0], [5.0]]), [0], torch.tensor([[3.0]]), torch.tensor([[1.0]]), eps=12.0)
    assert y.tolist() == [[-0.5], [2.5]]
    y, _ = reference.norm(torch.tensor([[3.0, 4.0]]), [1], eps=12.5, center=False)  # mean square 12.5, root of 25
    assert y.tolist() == [[0.6000000238418579, 0.800000011920929]]


def test_given_gain_and_bias_bring_the_input_back() -> None:
    """Ioffe & Szegedy 2015, section 3: gain = sigma and bias = mu make the layer the identity."""
    x = torch.randn(6, 5, dtype=torch.float64) * 3 + 2
    mean, var, _ = reference.moments(x, [0])
    y, _ = reference.norm(x, [0], (var + 1e-5).sqrt(), mean, eps=1e-5)
    assert_close(y, x)


def test_nothing_valid_gives_zero_moments() -> None:
    mean, var, count = reference.moments(torch.full((2, 3), math.nan), [1], torch.zeros(2, 3, dtype=torch.bool))
    assert not any(t.any() for t in (mean, var, count))


@pytest.mark.parametrize("mask_shape", [(2, 3, 4), (2, 1, 4), (1, 1, 4), (2, 3, 1), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("dims", [(0,), (1,), (2,), (0, 2), (1, 2), (0, 1, 2)], ids=str)
def test_moments_of_selected_elements(mask_shape: tuple[int, ...], dims: tuple[int, ...]) -> None:
    """Against picking the valid elements out one by one."""
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    mask = torch.rand(mask_shape) < 0.6
    got = [m.expand([1 if d in dims else s for d, s in enumerate(x.shape)]) for m in reference.moments(x, dims, mask)]
    kept = [d for d in range(3) if d not in dims]
    groups = x.permute(*kept, *dims).reshape(*[x.shape[d] for d in kept], -1)
    valid = mask.expand_as(x).permute(*kept, *dims).reshape(groups.shape)
    flat = [g.reshape(-1) for g in got]
    for i, (g, v) in enumerate(
        zip(groups.reshape(-1, groups.shape[-1]), valid.reshape(-1, groups.shape[-1]), strict=True)
    ):
        chosen = g[v]
        assert flat[2][i] == len(chosen)
        if len(chosen):
            assert_close(flat[0][i], chosen.mean())
            assert_close(flat[1][i], chosen.var(correction=0), scale=1.0)


@SETTINGS
def test_gradcheck(dims, weight_shape, masked, given, center) -> None:
    x, weight, bias, options = arguments(dims, weight_shape, masked, given, center)
    leaves = [t.requires_grad_() for t in (x, weight, bias) if t is not None]

    def f(x, weight=None, bias=None):
        return reference.norm(x, dims, weight, bias, **options)[0]

    assert torch.autograd.gradcheck(f, leaves)
    assert torch.autograd.gradgradcheck(f, leaves)


@SETTINGS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_explicit_backward_is_autograd_s(dims, weight_shape, masked, given, center, dtype) -> None:
    x, weight, bias, options = arguments(dims, weight_shape, masked, given, center, dtype)
    upstream = torch.randn_like(x)
    explicit = reference.norm_backward(upstream, x, dims, weight, bias, **options)
    wide = [None if t is None else t.double().requires_grad_() for t in (x, weight, bias)]
    options = {
        k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in options.items()
    }
    y, _ = reference.norm(wide[0], dims, *wide[1:], **options)
    truth = iter(torch.autograd.grad(y, [t for t in wide if t is not None], upstream.double()))
    for got, leaf in zip(explicit, wide, strict=True):
        assert (got is None) == (leaf is None)
        if got is not None:
            assert_close(got, next(truth), kind="grad", count=24, scale=4.0)
