"""torch's own recipes for several ranks, as they stand, around our layers: sequence parallelism, FSDP2, DDP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import normwise
from support.on_ranks import on_ranks
from support.tolerances import assert_close

WORLD = 2


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), normwise.LayerNorm(8), nn.Linear(8, 8), normwise.RMSNorm(8), Recurrent())


class Recurrent(nn.Module):
    """A recurrent layer whose state is left out."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = normwise.LSTM(8, 8, norm="layer", batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layer(x)[0]
        return output


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    model(x).square().mean().backward()
    found = []
    for p in model.parameters():
        grad = p.grad
        assert grad is not None
        found.append(grad.full_tensor() if hasattr(grad, "full_tensor") else grad)
    return found


def whole() -> tuple[Tensor, list[Tensor]]:
    """A batch for all ranks, and the gradients of one process that has all of it."""
    model = network()
    x = torch.randn(4 * WORLD, 5, 6, generator=torch.Generator().manual_seed(2))
    return x, gradients(model, x)


def fully_sharded() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    x, expected = whole()
    mesh = init_device_mesh("cpu", (WORLD,))
    model = network()
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    compare(gradients(model, x.chunk(WORLD)[dist.get_rank()]), expected)


def replicated() -> None:
    x, expected = whole()
    model = nn.parallel.DistributedDataParallel(network())
    compare(gradients(model, x.chunk(WORLD)[dist.get_rank()]), expected)


def compare(found: list[Tensor], expected: list[Tensor]) -> None:
    for got, truth in zip(found, expected, strict=True):
        assert_close(got, truth, kind="composed", count=1000)


def sequence_parallel() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import SequenceParallel, parallelize_module

    x = torch.randn(2, 2 * WORLD, 8, generator=torch.Generator().manual_seed(2))
    mesh = init_device_mesh("cpu", (WORLD,))
    own = x.chunk(WORLD, dim=1)[dist.get_rank()].clone()
    carried: dict[str, Any] = {"offset": 1.0, "cast": "input"}
    for name, options in (("LayerNorm", {}), ("LayerNorm", {"act": "gelu"}), ("RMSNorm", {}), ("RMSNorm", carried)):
        layer = getattr(normwise, name)(8, **options)
        with torch.no_grad():
            for p in layer.parameters():
                p.copy_(torch.rand(8, generator=torch.Generator().manual_seed(3)) + 0.5)
        truth = layer(x)
        (expected,) = torch.autograd.grad(truth.square().sum(), layer.weight)
        parallel = parallelize_module(layer, mesh, SequenceParallel())
        y = parallel(own)
        y.full_tensor().square().sum().backward()
        assert_close(y.full_tensor(), truth, count=8)
        assert_close(parallel.weight.grad.full_tensor(), expected, kind="composed", count=100)


@pytest.mark.parametrize("recipe", [fully_sharded, replicated, sequence_parallel])
def test_the_recipe_gives_the_numbers_of_one_process(recipe: Callable[[], None]) -> None:
    on_ranks(WORLD, recipe)
