"""Layers on the Triton kernels: forward, gradients, running averages and second derivatives as on the reference."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normwise
from normwise.ops.dispatch import found
from support.backends import ran, using, without_kernels
from support.tolerances import assert_close

x = torch.randn(4, 6, 9, generator=torch.Generator().manual_seed(0))
lengths = torch.tensor([9, 1, 5, 2])
mask = torch.arange(9) < lengths[:, None]
rows_mask = torch.tensor([[True] * 6, [False] * 6, [True, False] * 3, [True] * 6])

CALLS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Tensor], Tensor]]] = {
    "LayerNorm": (lambda: normwise.LayerNorm(9), lambda layer, x: layer(x)),
    "LayerNorm, mask": (lambda: normwise.LayerNorm(9, act="gelu"), lambda layer, x: layer(x, mask=rows_mask)),
    "LayerNorm, add": (lambda: normwise.LayerNorm(9), lambda layer, x: torch.cat(layer(x, add=x.sin()))),
    "LayerNorm, scale and shift": (
        lambda: normwise.LayerNorm(9, act="silu"),
        lambda layer, x: torch.cat(layer(x, scale=x[:, 0], shift=x[:, 1], add=x.sin(), mask=rows_mask)),
    ),
    "LayerNorm, gate": (
        lambda: normwise.LayerNorm(9),
        lambda layer, x: layer(x, scale=x[:, :1], gate=x.cos(), mask=rows_mask),
    ),
    "RMSNorm, gate": (
        lambda: normwise.RMSNorm(9, gate_first=True),
        lambda layer, x: torch.cat(layer(x, gate=x.cos(), add=x.sin())),
    ),
    "RMSNorm": (lambda: normwise.RMSNorm(9), lambda layer, x: layer(x)),
    "BatchNorm1d": (lambda: normwise.BatchNorm1d(6), lambda layer, x: layer(x)),
    "BatchNorm1d, lengths": (
        lambda: normwise.BatchNorm1d(6, act="silu"),
        lambda layer, x: layer(x, lengths=lengths, residual=x.cos()),
    ),
    "BatchNorm1d, momentum=None": (
        lambda: normwise.BatchNorm1d(6, momentum=None),
        lambda layer, x: layer(x, mask=mask),
    ),
    "BatchNorm1d, eval": (lambda: normwise.BatchNorm1d(6).eval(), lambda layer, x: layer(x, lengths=lengths)),
    "GroupNorm": (lambda: normwise.GroupNorm(3, 6, act="silu"), lambda layer, x: layer(x)),
    "GroupNorm, mask": (lambda: normwise.GroupNorm(3, 6), lambda layer, x: layer(x, mask=mask)),
    "InstanceNorm1d": (
        lambda: normwise.InstanceNorm1d(6, affine=True, track_running_stats=True),
        lambda layer, x: layer(x, lengths=lengths),
    ),
}


def outcome(layer: nn.Module, call: Callable[[nn.Module, Tensor], Tensor], backend: str) -> list[Tensor]:
    """Output, gradients, second derivatives and buffers."""
    leaf = x.clone().requires_grad_()
    with using(backend):
        y = call(layer, leaf)
        wanted = [leaf, *layer.parameters()]
        upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
        first = torch.autograd.grad(y, wanted, upstream, retain_graph=True)
        again = torch.autograd.grad(y, wanted, upstream, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in again), leaf)
    return [y, *first, *second, *[b.clone() for b in layer.buffers()]]


@pytest.mark.parametrize("name", CALLS)
def test_a_layer_is_as_on_the_reference(name: str) -> None:
    make, call = CALLS[name]
    layer = make()
    for p in layer.parameters():
        nn.init.normal_(p)
    on_triton, on_reference = (outcome(deepcopy(layer), call, backend) for backend in ("triton", "reference"))
    for n, (mine, expected) in enumerate(zip(on_triton, on_reference, strict=True)):
        assert_close(mine, expected, kind="composed", dtype=torch.float32, count=36, name=f"{name}, tensor {n}")


def test_triton_is_taken_where_the_reference_would_be() -> None:
    """Without the C++ kernels, as on a GPU."""
    layer = normwise.BatchNorm1d(6)
    with without_kernels(), ran() as plain:
        layer(x)
    with without_kernels(), ran() as masked:
        layer(x, lengths=lengths)
    assert (plain, masked) == ({"aten"}, {"triton"})
    assert found()["triton"] is None


def test_the_backward_is_the_kernels_and_reference_only_for_second_derivatives() -> None:
    layer, leaf = normwise.BatchNorm1d(6), x.clone().requires_grad_()
    with normwise.backend("triton"), ran() as seen:
        y = layer(leaf, lengths=lengths)
        y.sum().backward()
    assert seen == {"triton"}


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda: normwise.LSTM(3, 4, zoneout=0.1)(torch.randn(5, 2, 3)), "take no zoneout"),
        (lambda: normwise.LayerNorm(20_000)(torch.randn(2, 20_000)), "up to 16384 elements"),
        (lambda: torch.vmap(normwise.LayerNorm(9))(x), "do not see a Triton kernel"),
        (lambda: normwise.LayerNorm(9, device="meta")(torch.empty(2, 9, device="meta")), "not on meta"),
    ],
)
def test_forced_it_raises_with_the_reason(call: Callable[[], Any], reason: str) -> None:
    with normwise.backend("triton"), pytest.raises(normwise.BackendError, match=reason):
        call()
