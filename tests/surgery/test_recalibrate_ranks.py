"""recalibrate on several ranks: one set of statistics, of the data of all of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import normwise
from support.on_ranks import on_ranks
from support.tolerances import assert_close


def rows() -> Tensor:
    return torch.randn(11, 3, generator=torch.Generator().manual_seed(1)) * 3 + 5


def model() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 4), normwise.BatchNorm1d(4))


def recalibrated(sizes: list[int], exact: bool) -> list[Tensor]:
    """This rank's buffers, its share of the rows being `sizes[rank]` of them in batches of up to 4."""
    start = sum(sizes[: torch.distributed.get_rank()])
    mine = rows()[start : start + sizes[torch.distributed.get_rank()]]
    net = model()
    normwise.recalibrate(net, mine.split(4) if len(mine) else [], exact=exact)
    return [buffer.clone() for name, buffer in net.named_buffers() if name.endswith(("mean", "var", "tracked"))]


@pytest.mark.parametrize("sizes", [[8, 3], [11, 0]], ids=["uneven", "one without data"])
def test_statistics_of_all_ranks(sizes):
    one, other = on_ranks(2, recalibrated, sizes, True)
    alone = model()
    normwise.recalibrate(alone, [rows()], exact=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(one, other, strict=True))
    assert int(one[2]) == 3
    expected = [alone[0].running_mean, alone[0].running_var, alone[2].running_mean, alone[2].running_var]
    for mine, truth in zip(one[:2] + one[3:5], expected, strict=True):
        assert_close(mine, truth, kind="composed", count=11)


def test_at_once_the_first_layers_are_those_of_all_data():
    one, other = on_ranks(2, recalibrated, [8, 3], False)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(one, other, strict=True))
    assert_close(one[0], rows().double().mean(0), count=11)
    assert_close(one[1], rows().double().var(0), count=11)


def tables_and_averages(sizes: list[int]) -> list[Tensor]:
    """Of a recurrent batch norm and of an InstanceNorm, this rank having `sizes[rank]` of the samples."""
    torch.manual_seed(3)
    net = nn.ModuleList(
        [normwise.RNN(3, 4, norm="batch", num_stat_steps=3), nn.InstanceNorm1d(3, track_running_stats=True)]
    )
    x = torch.randn(9, 3, 5)
    start = sum(sizes[: torch.distributed.get_rank()]) if torch.distributed.is_initialized() else 0
    mine = x[start : start + sizes[torch.distributed.get_rank() if torch.distributed.is_initialized() else 0]]

    def forward(net: nn.Module, x: Tensor) -> None:
        net[0](x.permute(2, 0, 1))
        net[1](x)

    normwise.recalibrate(net, [mine] if len(mine) else [], forward=forward)
    return [net[0].running_mean_ih_l0, net[0].running_var_ih_l0, net[1].running_mean, net[1].running_var]


@pytest.mark.filterwarnings("ignore:a sequence of .* steps is longer")
def test_recurrent_tables_and_instance_norms_of_all_ranks():
    one, other = on_ranks(2, tables_and_averages, [6, 3])
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(one, other, strict=True))
    for mine, truth in zip(one, tables_and_averages([9]), strict=True):
        assert_close(mine, truth, kind="composed", count=45)


def without_any() -> str:
    net = model()
    try:
        normwise.recalibrate(net, [])
    except ValueError as error:
        return str(error)
    return ""


def test_no_batch_on_any_rank_is_an_error_on_each():
    assert all("no batch came" in text for text in on_ranks(2, without_any))


def test_a_process_group_that_is_not_initialised(monkeypatch):
    net = model()
    before = net[0].running_mean.clone()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="init_process_group"):
        normwise.recalibrate(net, [rows()])
    assert torch.equal(net[0].running_mean, before)
