"""The exchange of moments between ranks: what is pooled, what is compared, what fails."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from normwise.backends.reference import Moments, moments
from normwise.ops import distributed
from support.on_ranks import on_ranks
from support.tolerances import assert_close


def part(rank: int, layer: int) -> torch.Tensor:
    """What a rank saw of a layer: a different number of rows each, none on rank 1; a mean of 1e4."""
    generator = torch.Generator().manual_seed(10 * rank + layer)
    rows = (rank + layer + 2) if rank != 1 else 0
    return 1e4 + rank + torch.randn(rows, 3 + layer, generator=generator)


def pooled_moments() -> list[Moments]:
    own = [moments(part(dist.get_rank(), layer).double(), [0]) for layer in range(3)]
    if dist.get_rank() == 1:  # without data, anything may stand there
        own = [Moments(m.mean + float("nan"), m.var + float("inf"), m.count) for m in own]
    return distributed.pool_moments(own)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_pooled_moments_are_those_of_all_rows(size: int) -> None:
    results = on_ranks(size, pooled_moments)
    for layer in range(3):
        truth = moments(torch.cat([part(rank, layer) for rank in range(size)]).double(), [0])
        for result in results:
            for got, expected, name in zip(result[layer], truth, Moments._fields, strict=True):
                # The variance is that of numbers near 1e4, whose squares float64 resolves to 1e-8.
                assert_close(got, expected, name=name, scale=1e4 if name == "var" else None)
            assert all(torch.equal(a, b) for a, b in zip(result[layer], results[0][layer], strict=True))


def test_one_process_gets_its_own_moments_back() -> None:
    own = moments(torch.randn(5, 3), [0])
    (alone,) = distributed.pool_moments([own])
    assert alone.mean.dtype == torch.float64
    torch.testing.assert_close(alone.var.float(), own.var)
    assert distributed.pool_moments([]) == []


def disagreeing_moments() -> str:
    layers = 2 + (dist.get_rank() == 2)
    with pytest.raises(ValueError, match="disagree") as caught:
        distributed.pool_moments([moments(torch.randn(4, 3), [0])] * layers)
    return str(caught.value)


def test_disagreement_is_an_error_on_every_rank() -> None:
    told = on_ranks(3, disagreeing_moments)
    assert len(set(told)) == 1
    assert "layers = [2, 2, 3] on ranks 0 to 2" in told[0]
