"""SyncBatchNorm in use: exchanges counted, DistributedDataParallel, copies, one process, and what goes wrong."""

from __future__ import annotations

import copy
import os
import time
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pack_sequence
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import normwise
from support.norm_cases import randomize
from support.on_ranks import on_ranks
from support.tolerances import assert_close


def count_exchanges() -> list[list[int]]:
    """Numbers sent by each collective: of the first step, of the second forward, of the second backward."""
    sent: list[int] = []

    def counted(collective: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            own = args[0] if isinstance(args[0], Tensor) else args[1]
            sent.append(own.numel())
            return collective(*args, **kwargs)

        return call

    found = []
    with mock.patch.multiple(dist, all_gather=counted(dist.all_gather), all_reduce=counted(dist.all_reduce)):
        for layer, x in (
            (normwise.SyncBatchNorm(5), torch.randn(4, 5, 3, requires_grad=True)),
            (normwise.LayerNorm(5, process_group=dist.group.WORLD), torch.randn(8, 5, requires_grad=True)),
            (normwise.RMSNorm(5, process_group=dist.group.WORLD), torch.randn(8, 5, requires_grad=True)),
        ):
            layer(x).square().sum().backward()
            found.append(list(sent))
            sent.clear()
            y = layer(x)
            found.append(list(sent))
            sent.clear()
            y.square().sum().backward()
            found.append(list(sent))
            sent.clear()
            with torch.no_grad():
                layer.eval()(x)
            sent.clear()
    return found


def test_one_exchange_forward_and_one_backward() -> None:
    """A count, mean and variance a channel; two numbers a row (one for RMSNorm) and one count. Two of header each."""
    for found in on_ranks(2, count_exchanges):
        batch, layer, rms = found[:3], found[3:6], found[6:]
        assert batch == [[1, 2 + 3 * 5, 2 * 5], [2 + 3 * 5], [2 * 5]]  # the first forward compares the channels
        assert layer == [[2, 2 + 2 * 8 + 1, 2 * 8], [2 + 2 * 8 + 1], [2 * 8]]
        assert rms == [[2, 2 + 8 + 1, 8], [2 + 8 + 1], [8]]


class Net(nn.Module):
    """A layer used twice in a forward, one that is used only on demand, and a residual."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(3, 6, 3, padding=1), nn.Conv1d(6, 6, 3, padding=1)
        self.norm, self.last = norm(6, act="relu"), norm(6)
        self.unused = norm(6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        y = self.norm(self.first(x), lengths=lengths)
        y = self.norm(self.second(y), lengths=lengths, residual=y)
        y = self.last(self.first.weight.new_zeros(()) + y, lengths=lengths)
        return self.head(y.sum(2))


SAMPLES = {2: [3, 2], 3: [2, 0, 4]}


def batch(step: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(count, 3, 7, dtype=torch.float64, generator=generator)
    lengths = torch.randint(1, 8, (count,), generator=generator)
    return x, lengths, torch.randn(count, 2, dtype=torch.float64, generator=generator)


def net(norm: Any) -> nn.Module:
    torch.manual_seed(3)
    return Net(norm).double()


def train(model: nn.Module, share: slice, samples: int, scale: float) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        x, lengths, target = batch(step, samples)
        optimizer.zero_grad()
        error = model(x[share], lengths[share]) - target[share]
        # Two forwards before the backward, as in adversarial training: no buffer may be needed in its old state.
        more = model(-x[share], lengths[share])
        ((error.square().sum() + more.square().sum()) * scale / samples).backward()
        optimizer.step()


def train_in_parallel(broadcast_buffers: bool, find_unused: bool) -> dict[str, Tensor]:
    rank, size = dist.get_rank(), dist.get_world_size()
    counts = SAMPLES[size]
    share = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    model = net(normwise.SyncBatchNorm)
    if not find_unused:
        model.unused.requires_grad_(False)
    parallel = DistributedDataParallel(model, broadcast_buffers=broadcast_buffers, find_unused_parameters=find_unused)
    train(parallel, share, sum(counts), scale=size)  # DistributedDataParallel takes the mean over ranks
    return dict(model.state_dict())


@pytest.mark.parametrize("broadcast_buffers", [True, False])
@pytest.mark.parametrize(("size", "find_unused"), [(2, True), (3, False)])
def test_under_distributed_data_parallel(size: int, find_unused: bool, broadcast_buffers: bool) -> None:
    """Three optimizer steps on uneven and empty batches are those of one process on the whole batch."""
    alone = net(normwise.BatchNorm1d)
    train(alone, slice(None), sum(SAMPLES[size]), scale=1.0)
    states = on_ranks(size, train_in_parallel, broadcast_buffers, find_unused)
    for name, expected in alone.state_dict().items():
        assert all(torch.equal(state[name], states[0][name]) for state in states), name
        assert_close(states[0][name].double(), expected, kind="composed", count=100, name=name)


def own_and_all(rows: int = 4) -> tuple[Tensor, list[Tensor]]:
    """This rank's batch, of `rows` samples or more, and those of all ranks."""
    rank = dist.get_rank()
    torch.manual_seed(rank)
    own = torch.randn(rows + 2 * rank, 4)
    everyone: list[Any] = [None, None]
    dist.all_gather_object(everyone, own)
    return own, everyone


def packed_sequences() -> None:
    rank = dist.get_rank()
    own, everyone = own_and_all()
    parts = list(own.split([3 + rank, 1 + rank]))
    layer, plain = normwise.SyncBatchNorm(4), nn.BatchNorm1d(4)
    packed = layer(pack_sequence(parts, enforce_sorted=False))
    truth = plain(torch.cat(everyone)).split([len(t) for t in everyone])[rank]
    order = pack_sequence(list(truth.split([len(p) for p in parts])), enforce_sorted=False)
    assert_close(packed.data, order.data, count=10)
    assert_close(layer.running_var, plain.running_var, count=10)


def test_packed_sequences_have_the_statistics_of_all_ranks() -> None:
    on_ranks(2, packed_sequences)


def functionals() -> None:
    rank, world = dist.get_rank(), dist.group.WORLD
    own, everyone = own_and_all()
    f, means, variances = normwise.functional, torch.zeros(4), torch.ones(4)
    truth = nn.BatchNorm1d(4)
    y = f.batch_norm(own, means, variances, training=True, process_group=world)
    assert_close(y, truth(torch.cat(everyone)).split([len(t) for t in everyone])[rank], count=10)
    assert_close(means, truth.running_mean, scale=1.0, count=10)
    halves = torch.cat([everyone[0], everyone[0]], 1).chunk(2, 1)[rank]
    assert_close(f.layer_norm(halves, (4,), process_group=world), f.layer_norm(everyone[0], (4,)), count=8)
    assert_close(f.rms_norm(halves, (4,), process_group=world), f.rms_norm(everyone[0], (4,)), count=8)


def test_functionals_take_a_process_group() -> None:
    on_ranks(2, functionals)


def without_an_exchange() -> None:
    own, everyone = own_and_all()
    layer, plain = normwise.SyncBatchNorm(4), nn.BatchNorm1d(4)
    layer(own), plain(torch.cat(everyone))
    averaged = AveragedModel(nn.Sequential(layer))
    averaged.update_parameters(nn.Sequential(layer))
    averaged(own)
    groups = [dist.new_group([r]) for r in range(2)]
    group = groups[dist.get_rank()]
    alone = normwise.SyncBatchNorm(4, process_group=group)
    with mock.patch.object(dist, "all_gather", side_effect=AssertionError("sent something")):
        assert_close(layer.eval()(own), plain.eval()(own), count=9)
        assert_close(alone(own), nn.BatchNorm1d(4)(own), count=9)
    assert copy.deepcopy(alone).process_group is group


def test_evaluation_and_a_group_of_one_rank_send_nothing_and_copies_share_the_group() -> None:
    on_ranks(2, without_an_exchange)


def checkpointed() -> None:
    layer = normwise.SyncBatchNorm(4, momentum=None)
    x = own_and_all()[0].requires_grad_()
    checkpoint(layer, x, use_reentrant=False).square().sum().backward()
    assert layer.num_batches_tracked == 1


def test_checkpointing_repeats_the_exchange_and_updates_running_statistics_once() -> None:
    on_ranks(2, checkpointed)


def not_finite_or_empty() -> None:
    own, _ = own_and_all()
    layer = normwise.SyncBatchNorm(4)
    layer(own)
    before = layer.running_mean.clone()
    with pytest.warns(UserWarning, match="running averages"):
        layer(own + (float("nan") if dist.get_rank() == 0 else 0.0))
    assert torch.equal(layer.running_mean, before)
    assert layer.num_batches_skipped == 1

    empty = layer(torch.empty(0, 4, 3, requires_grad=True))
    empty.sum().backward()
    assert torch.equal(layer.running_mean, before)


def test_nan_on_one_rank_or_no_sample_on_any_updates_no_rank() -> None:
    on_ranks(2, not_finite_or_empty)


def faults() -> dict[str, str]:
    rank = dist.get_rank()
    said = {}
    with pytest.raises(ValueError, match="disagree") as caught:
        normwise.SyncBatchNorm(3 + rank)(torch.randn(2, 3 + rank))
    said["channels"] = str(caught.value)
    layer = randomize(normwise.SyncBatchNorm(3))
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match="disagree") as caught:
        layer(torch.randn(2, 3).to(torch.bfloat16 if rank else torch.float32))
    said["dtype"] = str(caught.value)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training") as caught:
        layer(torch.randn(rank, 3))
    with pytest.raises(ValueError, match="on any rank") as caught:
        layer(torch.randn(2, 3), mask=torch.zeros(2, dtype=torch.bool))
    said["mask"] = str(caught.value)
    with pytest.raises(normwise.ShapeError, match="mask of shape"):
        layer(torch.randn(2, 3), mask=torch.zeros(3, 2, dtype=torch.bool))
    with normwise.backend("cpu"), pytest.raises(normwise.BackendError, match="several ranks"):
        layer(torch.randn(2, 3))
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name
    layer(torch.randn(2, 3))  # and works again
    return said


def test_what_is_refused_is_refused_on_every_rank() -> None:
    first, second = on_ranks(2, faults)
    assert first == second
    assert "number of channels = [3, 4] on ranks 0 to 1" in first["channels"]
    assert "torch.bfloat16" in first["dtype"]


def one_fails(how: str) -> tuple[str, float] | None:
    layer = normwise.SyncBatchNorm(3)
    x = torch.randn(2, 3, requires_grad=True)
    y = layer(x)
    if dist.get_rank() == 1:
        if how == "dies":
            os._exit(1)
        time.sleep(5)  # longer than the others wait
        return None
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="died, raised an error, or did not take part") as caught:
        y.sum().backward()
    return str(caught.value), time.monotonic() - began


@pytest.mark.parametrize("how", ["dies", "stays away"])
def test_a_missing_rank_is_an_error_on_the_others(how: str) -> None:
    first, missing, last = on_ranks(3, one_fails, how, timeout=2)
    assert missing is None
    for told, seconds in (first, last):
        assert "The backend says" in told
        assert seconds < 4.5


def test_one_process_without_torch_distributed_is_batch_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without torch.distributed it is BatchNorm; where ranks were started and not connected, that would be wrong."""
    x = torch.randn(6, 3, 4)
    layer, plain = normwise.SyncBatchNorm(3, bias=False, act="relu"), nn.BatchNorm1d(3)
    assert_close(layer(x), plain(x).relu(), count=24)
    assert_close(layer.eval()(x), plain.eval()(x).relu(), count=24)
    assert layer.bias is None
    assert layer.process_group is None
    assert "process_group" not in repr(layer)
    assert isinstance(copy.deepcopy(layer), normwise.SyncBatchNorm)
    theirs = nn.SyncBatchNorm(3, 1e-4, 0.2, True, True, None)  # the same positions
    ours = normwise.SyncBatchNorm(3, 1e-4, 0.2, True, True, None)
    ours.load_state_dict(theirs.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    monkeypatch.setenv("WORLD_SIZE", "2")
    layer.eval()(x)
    with pytest.raises(RuntimeError, match=r"has not been initialized.*init_process_group"):
        layer.train()(x)
    with pytest.raises(normwise.ShapeError, match="expected 2D or 3D or 4D or 5D input"):
        layer(torch.randn(3))
