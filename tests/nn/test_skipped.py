"""The count of skipped batches is no buffer, and stays with its layer all the same."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

import normwise
from support.norm_cases import Case, each_case

pytestmark = pytest.mark.filterwarnings("ignore:.*skipped an update")

MAKERS = [normwise.BatchNorm1d, normwise.SyncBatchNorm, normwise.BatchRenorm1d]
each_maker = pytest.mark.parametrize("make", MAKERS)

FINITE, SPOILT = torch.randn(8, 3), torch.full((8, 3), torch.nan)


@each_case
def test_buffers_are_those_of_torch(case: Case) -> None:
    ours, theirs = dict(case.ours().named_buffers()), dict(case.theirs().named_buffers())
    assert {n: (b.shape, b.dtype) for n, b in ours.items()} == {n: (b.shape, b.dtype) for n, b in theirs.items()}


def test_buffers_of_layers_beside_the_cases_are_those_of_torch() -> None:
    for name, args in (
        ("SyncBatchNorm", (4,)),
        ("LSTM", (3, 4)),
        ("GRU", (3, 4)),
        ("RNN", (3, 4)),
        ("LSTMCell", (3, 4)),
    ):
        ours = getattr(normwise, name)(*args)
        assert [n for n, _ in ours.named_buffers()] == [n for n, _ in getattr(nn, name)(*args).named_buffers()]


@each_maker
def test_a_training_that_skips_nothing_does_not_touch_the_count(make: type[nn.Module]) -> None:
    layer = make(3)
    layer._skipped = None
    layer(FINITE), layer(FINITE, mask=torch.ones(8).bool()), layer.eval()
    assert layer._skipped is None
    assert layer.num_batches_skipped == 0


@each_maker
def test_the_count_goes_where_its_layer_goes(make: type[nn.Module]) -> None:
    layer = make(3)
    layer(SPOILT)
    for other in (
        copy.copy(layer),
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        layer.double(),
        layer.cpu(),
    ):
        assert other.num_batches_skipped == 1
        assert other.num_batches_skipped.dtype == torch.int64
    deep = copy.deepcopy(layer)
    deep.float()(SPOILT)
    assert (deep.num_batches_skipped, layer.num_batches_skipped) == (2, 1)
    layer.reset_running_stats()
    assert layer.num_batches_skipped == 0


@each_maker
def test_the_count_moves_to_the_device_of_the_averages(make: type[nn.Module], device: torch.device) -> None:
    layer = make(3)
    layer(SPOILT)
    layer.to(device)
    assert layer.num_batches_skipped.device.type == device.type
    layer(SPOILT.to(device))
    assert layer.num_batches_skipped == 2


def by_assignment(make: type[nn.Module]) -> nn.Module:
    with torch.device("meta"):
        layer = make(3)
    layer.load_state_dict(make(3).state_dict(), assign=True)
    return layer.to("cpu")


def by_to_empty(make: type[nn.Module]) -> nn.Module:
    layer = make(3, device="meta").to_empty(device="cpu")
    layer.reset_parameters()
    return layer


def by_skip_init(make: type[nn.Module]) -> nn.Module:
    layer = nn.utils.skip_init(make, 3)
    layer.load_state_dict(make(3).state_dict())
    return layer


@each_maker
@pytest.mark.parametrize("build", [by_assignment, by_to_empty, by_skip_init])
def test_a_layer_that_was_built_without_numbers_counts_from_zero(make: type[nn.Module], build) -> None:
    layer = build(make)
    assert layer.num_batches_skipped == 0
    layer(FINITE), layer(SPOILT)
    assert (layer.num_batches_skipped, layer.num_batches_tracked) == (1, 1)


@each_maker
def test_a_layer_on_meta_lends_its_forward_to_other_buffers(make: type[nn.Module]) -> None:
    layer, state = make(3, device="meta"), make(3).state_dict()
    torch.func.functional_call(layer, state, FINITE)
    torch.func.functional_call(layer, state, SPOILT)
    assert state["num_batches_tracked"] == 1
    assert state["running_mean"].isfinite().all()
    moved = make(3)
    moved(SPOILT)
    moved.to("meta")
    torch.func.functional_call(moved, state, SPOILT)
    assert moved._skipped == 2


def test_fake_tensors_leave_the_count_alone() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    layer = normwise.BatchNorm1d(3)
    layer(SPOILT)
    mode = FakeTensorMode()
    fakes = {name: mode.from_tensor(t) for name, t in layer.state_dict().items()}
    with mode:
        torch.func.functional_call(layer, fakes, torch.empty(8, 3))
    assert type(layer._skipped) is torch.Tensor
    assert layer.num_batches_skipped == 1


@each_maker
def test_compiled_it_counts_and_is_compiled_once(make: type[nn.Module]) -> None:
    torch._dynamo.reset()
    layer = make(3)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for x in (FINITE, SPOILT, SPOILT, FINITE):
            compiled(x)
    assert (layer.num_batches_tracked, layer.num_batches_skipped) == (2, 2)


def test_a_module_that_pairs_buffers_with_torch_s() -> None:
    """As code that averages weights does, and DistributedDataParallel's broadcast of buffers."""
    ours, theirs = normwise.BatchNorm2d(3), nn.BatchNorm2d(3)
    for mine, their in zip(ours.buffers(), theirs.buffers(), strict=True):
        mine.copy_(their)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        averaged = torch.optim.swa_utils.AveragedModel(ours, use_buffers=True)
        averaged.update_parameters(ours)
    assert [n for n, _ in averaged.module.named_buffers()] == [n for n, _ in theirs.named_buffers()]
