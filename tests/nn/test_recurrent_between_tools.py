"""between= and residual= where something else calls the layer, or looks at it: checkpointing, torch.compile with its
own compiler, and re-estimated statistics."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import normwise
from support.recurrent_cases import LAYERS, away_from_start
from support.tolerances import assert_close

T, B, INPUT, HIDDEN = 5, 3, 4, 6
LENGTHS = torch.tensor([3, 5, 2])
OPTIONS: list[dict[str, Any]] = [{"between": "layer", "residual": True}, {"between": "rms"}, {"residual": True}]
each_options = pytest.mark.parametrize("options", OPTIONS, ids=str)


def build(cell: str, **options: Any) -> Any:
    return away_from_start(LAYERS[cell](INPUT, HIDDEN, 3, **options))


def trained(layer: nn.Module, run: Callable[[Tensor], Any], x: Tensor) -> list[Tensor]:
    """Output, all gradients and the buffers after a step."""
    leaf = x.clone().requires_grad_()
    output = run(leaf)
    grads = torch.autograd.grad(output, [leaf, *layer.parameters()], torch.linspace(-1, 1, 90).view(5, 3, 6))
    return [output.detach(), *grads, *(b.clone() for b in layer.buffers())]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(("cell", "norm"), [("lstm", "layer"), ("gru", None), ("rnn", "batch")])
@each_options
def test_checkpointing_gives_the_same_numbers(
    options: dict[str, Any], cell: str, norm: str | None, reentrant: bool
) -> None:
    """Dropout included; running statistics move once."""
    layer = build(cell, norm=norm, dropout=0.3, **options)
    twin, x = copy.deepcopy(layer), torch.randn(T, B, INPUT)
    torch.manual_seed(0)
    expected = trained(twin, lambda x: twin(x)[0], x)
    torch.manual_seed(0)
    leaf = x.clone().requires_grad_()
    output = checkpoint(lambda x: layer(x)[0], leaf, use_reentrant=reentrant)
    output.backward(torch.linspace(-1, 1, 90).view(5, 3, 6))
    found = [output.detach(), leaf.grad, *(p.grad for p in layer.parameters()), *layer.buffers()]
    # Not to the bit: without a gradient, as a reentrant checkpoint first runs, another backend may be chosen.
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, kind="composed", count=T * B, scale=max(1.0, float(b.abs().max())))


@pytest.mark.parametrize(("cell", "norm"), [("lstm", "layer"), ("gru", "rms")])
def test_inductor_compiles_them_in_one_graph(cell: str, norm: str) -> None:
    torch._dynamo.reset()
    layer = build(cell, norm=norm, between="layer", residual=True)
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.randn(T, B, INPUT)
    expected = trained(layer, lambda x: layer(x, lengths=LENGTHS)[0], x)
    found = trained(layer, lambda x: compiled(x, lengths=LENGTHS)[0], x)
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, kind="composed", count=T * B, scale=max(1.0, float(b.abs().max())))


def test_statistics_of_the_batch_norms_inside_are_reestimated() -> None:
    """The second layer's are of what the norm between and the first layer, by its new statistics, make of a batch."""
    layer = build("gru", norm="batch", between="layer", residual=True, num_stat_steps=T, momentum=1.0)
    model = nn.Sequential(layer)
    x = torch.randn(T, 20, INPUT)
    expected = copy.deepcopy(layer).train()
    expected(x)  # with a momentum of 1 the tables are those of the batch
    gains = layer.gain_between_l0.detach().clone()
    with torch.no_grad():
        for table in layer.buffers():
            table.fill_(7)
    normwise.recalibrate(model, [x])
    assert torch.equal(layer.gain_between_l0, gains)
    for name, table in layer.named_buffers():
        if name.startswith(("mean", "running_mean")):
            assert_close(table, expected.get_buffer(name), kind="composed", count=20, scale=1.0, name=name)
    assert not any((table == 7).all() for table in layer.buffers())
