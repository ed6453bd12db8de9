"""Norms over several ranks under torch.compile: one graph, with the exchange in it."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist

import normwise
from support.norm_cases import randomize
from support.on_ranks import on_ranks
from support.tolerances import assert_close


def compiled() -> None:
    torch.manual_seed(dist.get_rank())
    world = dist.group.WORLD
    for layer, shapes in (
        (normwise.SyncBatchNorm(4, act="gelu"), [(5, 4)]),
        # Of one row the gradient of the bias is that of the output itself.
        (normwise.LayerNorm(4, process_group=world), [(5, 4), (1, 4)]),
        (normwise.RMSNorm(4, process_group=world), [(5, 4)]),
    ):
        twin = copy.deepcopy(randomize(layer))
        for shape in shapes:
            mask = torch.rand(shape[0]) < 0.8 if shape[0] > 1 else None
            x = torch.randn(shape, requires_grad=True)
            y = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=False)(x, mask=mask)
            expected = twin(x, mask=mask)
            upstream = torch.randn_like(y)
            assert_close(y, expected)
            for got, truth in zip(
                torch.autograd.grad(y, [x, *layer.parameters()], upstream),
                torch.autograd.grad(expected, [x, *twin.parameters()], upstream),
                strict=True,
            ):
                assert_close(got, truth, kind="grad", count=5)
        for name, value in layer.state_dict().items():
            assert_close(value.float(), twin.state_dict()[name].float(), name=name)


def test_compiled_in_one_graph() -> None:
    on_ranks(2, compiled)
