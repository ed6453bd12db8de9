"""Recurrent layers and cells on the Triton kernels: all that a call of a layer does around them, and second
derivatives, as on the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

import normwise
from normwise.ops.dispatch import BACKENDS
from support.backends import using
from support.recurrent_cases import CELLS, LAYERS, away_from_start

pytestmark = pytest.mark.skipif("triton" not in BACKENDS, reason="the Triton kernels are not a backend here")

LENGTHS, RESET = torch.tensor([1, 3, 2]), torch.tensor([[0, 0, 1], [0, 1, 1], [1, 0, 0]]).bool()
CALLS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "dense": lambda layer, x: layer(x),
    "lengths and resets": lambda layer, x: layer(x, lengths=LENGTHS, reset=RESET),
    "packed": lambda layer, x: layer(pack_sequence([x[:2, 0], x[:, 1], x[:1, 2]], enforce_sorted=False)),
    "unbatched": lambda layer, x: layer(x[:, 0]),
}


def flat(found: Any) -> list[Tensor]:
    """All tensors of a result that have a gradient."""
    if isinstance(found, Tensor):
        return [found] if found.is_floating_point() else []
    return [t for part in found if part is not None for t in flat(part)]


def outcome(call: Callable[[Tensor], Any], module: nn.Module, x: Tensor, backend: str) -> list[Tensor]:
    """Results, gradients, and gradients of these."""
    leaf = x.clone().requires_grad_()
    with using(backend):
        results = flat(call(leaf))
        wanted = [leaf, *module.parameters()]
        loss = sum((t * torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view_as(t)).sum() for t in results)
        first = torch.autograd.grad(loss, wanted, retain_graph=True)
        again = torch.autograd.grad(loss, wanted, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in again), leaf)
    return [*(t.detach() for t in results), *first, *second]


def same(call: Callable[[Tensor], Any], module: nn.Module, x: Tensor) -> None:
    expected = outcome(call, module, x, "reference")
    for found, true in zip(outcome(call, module, x, "triton"), expected, strict=True):
        torch.testing.assert_close(found, true, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("cell", LAYERS)
@pytest.mark.parametrize("way", CALLS)
def test_stacks_in_both_directions(cell: str, way: str) -> None:
    layer = away_from_start(LAYERS[cell](4, 5, num_layers=2, bidirectional=True).double())
    same(lambda x: CALLS[way](layer, x), layer, torch.randn(3, 3, 4, dtype=torch.float64))


@pytest.mark.parametrize(
    ("cell", "options"),
    [("lstm", {"between": "layer", "residual": True}), ("gru", {"between": "rms"}), ("rnn", {"residual": True})],
    ids=str,
)
@pytest.mark.parametrize("way", ["dense", "lengths and resets"])
def test_norms_and_skips_between_layers(way: str, cell: str, options: dict[str, Any]) -> None:
    """The norms between are Triton's too: nothing else runs."""
    layer = away_from_start(LAYERS[cell](4, 5, num_layers=3, **options).double())
    same(lambda x: CALLS[way](layer, x), layer, torch.randn(3, 3, 4, dtype=torch.float64))


@pytest.mark.parametrize("cell", CELLS)
def test_cells(cell: str) -> None:
    module = away_from_start(CELLS[cell](4, 5).double())
    same(module, module, torch.randn(3, 4, dtype=torch.float64))


def test_autocast_multiplies_in_its_dtype() -> None:
    layer = normwise.LSTM(4, 5)
    with using("triton"), torch.autocast("cpu", torch.bfloat16):
        y, _ = layer(torch.randn(2, 2, 4))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())


def test_what_they_cannot_run_is_refused() -> None:
    layer = normwise.LSTM(4, 5, zoneout=0.1)
    with normwise.backend("triton"), pytest.raises(normwise.BackendError, match="no zoneout"):
        layer(torch.randn(2, 2, 4))
