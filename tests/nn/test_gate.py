"""gate= in the call: a gated norm equals its plain formula."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import normwise
from support.modulated_norms import DTYPES, C, N, leaves
from support.tolerances import assert_close


@pytest.mark.parametrize("first", [True, False], ids=["gate first", "norm first"])
@pytest.mark.parametrize("act", ["silu", "sigmoid", None])
@pytest.mark.parametrize("make", [normwise.RMSNorm, normwise.LayerNorm])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gate(make, first, act, dtype):
    layer = make(C, eps=1e-5, gate_first=first, gate_act=act)
    nn.init.uniform_(layer.weight, 0.5, 1.5)
    layer = layer.to(dtype)
    x, gate, add = leaves(*torch.randn(3, N, 5, C, dtype=torch.float64), dtype=dtype)
    truth = leaves(x, gate, dtype=torch.float64)
    opened = truth[1] if act is None else getattr(F, act)(truth[1])
    plain = copy.deepcopy(layer).double()
    expected = plain(truth[0] * opened) if first else plain(truth[0]) * opened
    y = layer(x, gate=gate)
    assert y.dtype == dtype
    kind = "forward" if dtype == torch.bfloat16 else "composed"
    assert_close(y, expected, kind=kind, count=C, scale=float(expected.detach().abs().max()) * 4)
    upstream = torch.randn_like(x)
    for a, b in zip(
        torch.autograd.grad(y, (x, gate), upstream),
        torch.autograd.grad(expected, truth, upstream.double()),
        strict=True,
    ):
        assert_close(a, b, kind="grad" if dtype == torch.bfloat16 else "composed", count=C * 8)
    if dtype == torch.float64:
        total = x + add
        both = layer(x, add=add, gate=gate)
        assert_close(both[0], layer(total, gate=gate), kind="composed")
        assert torch.equal(both[1], total)


@pytest.mark.parametrize("first", [True, False])
def test_a_gate_in_padding_is_not_seen(first):
    layer = normwise.RMSNorm(C, eps=1e-5, gate_first=first, dtype=torch.float64)
    x, gate = torch.randn(2, N, 5, C, dtype=torch.float64)
    mask = torch.rand(N, 5) < 0.6
    spoilt = leaves(*(t.masked_fill(~mask[..., None], torch.nan) for t in (x, gate)), dtype=torch.float64)
    y = layer(spoilt[0], gate=spoilt[1], mask=mask)
    expected = layer(x, gate=gate) * mask[..., None]
    assert_close(y, expected, kind="composed")
    for g in torch.autograd.grad(y.square().sum(), spoilt):
        assert not g[~mask].any()
        assert g[mask].all()


@pytest.mark.parametrize("first", [True, False])
def test_second_derivatives_of_a_gate_with_a_mask_and_a_sum(first):
    layer = normwise.LayerNorm(C, gate_first=first, act="silu" if first else None, dtype=torch.float64)
    given = leaves(*torch.randn(3, 2, 3, C, dtype=torch.float64), dtype=torch.float64)
    mask = torch.tensor([[True, True, False], [True, True, True]])

    def call(x: Tensor, add: Tensor, gate: Tensor) -> Any:
        return layer(x, add=add, gate=gate, mask=mask)

    assert gradcheck(call, given, fast_mode=True, check_batched_grad=True)
    assert gradgradcheck(call, given, fast_mode=True)


def test_a_gate_changed_in_place_before_the_backward_is_noticed():
    x, gate = torch.randn(2, N, 5, C)
    y = normwise.RMSNorm(C)(x, gate=gate.requires_grad_())
    with torch.no_grad():
        gate.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_one_tensor_as_input_and_gate_gets_both_gradients():
    layer = normwise.RMSNorm(C, eps=1e-5, dtype=torch.float64)
    x = torch.randn(N, 5, C, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: layer(x, gate=x), x)
    assert gradgradcheck(lambda x: layer(x, gate=x), x)
