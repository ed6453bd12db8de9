"""What is put back comes back bit for bit, and what nobody touched is not written to."""

from __future__ import annotations

import math
import random

import numpy
import pytest
import torch
from torch import nn

import normwise
from normwise.measure.snapshot import RandomState, Values, dry_run, modes_kept, same_bits, state_kept, state_of


def draws():
    return random.random(), float(torch.rand(())), float(numpy.random.rand())  # noqa: NPY002


def test_random_states_of_torch_python_numpy_and_a_generator():
    generator = torch.Generator().manual_seed(1)
    state = RandomState([generator])
    first = (*draws(), float(torch.rand((), generator=generator)))
    state.restore()
    assert (*draws(), float(torch.rand((), generator=generator))) == first


@pytest.mark.parametrize("value", [math.nan, -0.0, math.inf, 1.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64, torch.int64], ids=str)
def test_values_come_back_and_untouched_tensors_are_not_written_to(value, dtype):
    value = value if dtype.is_floating_point or dtype.is_complex else 3
    tensor, other = torch.full((3,), value, dtype=dtype), torch.full((3,), value, dtype=dtype)
    kept = Values([tensor, other, tensor])
    tensor.fill_(7)
    kept.restore()
    assert same_bits(tensor, other)
    assert other._version == 0


def test_state_is_buffers_and_tensors_beside_them():
    norm = normwise.BatchNorm1d(3)
    norm(torch.tensor([[1.0, 2.0, 3.0], [2.0, 1.0, 0.0]]))
    model = nn.Sequential(norm, nn.Linear(3, 3))
    model.threshold = torch.tensor(0.5)
    before = norm.running_mean.clone()
    with state_kept(model):
        with pytest.warns(UserWarning, match="skipped an update"):
            norm(torch.full((2, 3), math.nan))
        norm(torch.randn(4, 3))
        model.threshold += 1
        assert int(norm.num_batches_skipped) == 1
    assert int(norm.num_batches_skipped) == 0
    assert int(norm.num_batches_tracked) == 1
    assert torch.equal(norm.running_mean, before)
    assert float(model.threshold) == 0.5
    assert not any(p is t for p in model.parameters() for t in state_of(model))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_a_dry_run_leaves_a_frozen_layer_in_eval_mode(training, fails):
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.BatchNorm1d(3)).train()
    model[1].eval()
    buffers, state = {n: b.clone() for n, b in model.named_buffers()}, RandomState()
    expected = draws()
    state.restore()
    try:
        with dry_run(model, training=training):
            assert all(module.training is training for module in model.modules())
            model(torch.randn(8, 3))
            draws()
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert [module.training for module in model] == [True, False, True, True]
    assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())
    assert draws() == expected


def test_modes_are_those_of_each_module():
    model = nn.Sequential(nn.Linear(1, 1), nn.Sequential(nn.ReLU()))
    model[1].eval()
    with modes_kept([model, model[1]]):
        model.eval()
        model[1].train()
    assert [m.training for m in model.modules()] == [True, False, False, True]
