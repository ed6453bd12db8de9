"""recalibrate of norms that keep more than BatchNorm: tables over steps, averages over samples."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import normwise
from support.recurrent_cases import LAYERS, away_from_start
from support.surgery_models import assert_same_state, state
from support.tolerances import assert_close

T, INPUT, HIDDEN = 6, 3, 4
SIZES = (5, 2, 3)


def recurrent(cell: str = "lstm", **options) -> nn.Module:
    return away_from_start(LAYERS[cell](INPUT, HIDDEN, norm="batch", dtype=torch.float64, **options)).eval()


def sequences() -> list[tuple[Tensor, Tensor]]:
    """Batches of different sizes, levels and lengths, padding being NaN."""
    batches = []
    for level, size in enumerate(SIZES):
        x, lengths = torch.randn(T, size, INPUT, dtype=torch.float64) + level, torch.randint(1, T + 1, (size,))
        lengths[0] = T - level
        batches.append((x.masked_fill(torch.arange(T).view(-1, 1, 1) >= lengths.view(1, -1, 1), torch.nan), lengths))
    return batches


def call(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    model(batch[0], lengths=batch[1])


def summed_inputs(layer: nn.Module, batches: list[tuple[Tensor, Tensor]], steps: range) -> Tensor:
    """W_ih x of all samples that are running at these steps, (values, features)."""
    rows = [x[t, lengths > t] for x, lengths in batches for t in steps if bool((lengths > t).any())]
    return torch.cat(rows) @ layer.weight_ih_l0.detach().T


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("rows", [T, 3, 1])
@pytest.mark.parametrize("cell", LAYERS)
@pytest.mark.filterwarnings("ignore:a sequence of .* steps is longer")
def test_each_row_is_of_all_samples_at_its_step(cell, rows, exact):
    """Of the summed inputs, which no statistic goes into; the last row is of all steps that share it."""
    layer, batches = recurrent(cell, num_stat_steps=rows), sequences()
    normwise.recalibrate(layer, batches, forward=call, exact=exact)
    for row in range(rows):
        values = summed_inputs(layer, batches, range(row, T) if row == rows - 1 else range(row, row + 1))
        assert_close(layer.running_mean_ih_l0[row], values.mean(0), count=len(values))
        assert_close(layer.running_var_ih_l0[row], values.var(0), count=len(values))


@pytest.mark.parametrize("options", [{"bidirectional": True, "num_layers": 2}, {"variant": "laurent2015"}], ids=str)
def test_of_one_batch_the_tables_are_those_that_training_would_move_to(options):
    layer = recurrent(num_stat_steps=T, **options)
    x, lengths = torch.randn(T, 5, INPUT, dtype=torch.float64), torch.tensor([T, T, 4, 2, 2])  # at no step one alone
    twin = copy.deepcopy(layer).train()
    twin.momentum = 1.0
    twin(x, lengths=lengths)
    normwise.recalibrate(layer, [(x, lengths)], forward=call)
    for name, table in twin.named_buffers():
        assert_close(layer.get_buffer(name), table, kind="composed", name=name)


def test_steps_that_no_sequence_reached_keep_their_rows():
    layer, batches = recurrent("gru", num_stat_steps=T + 2), sequences()
    before = layer.running_mean_hh_l0.clone()
    report = normwise.recalibrate(layer, batches, forward=call)
    assert torch.equal(layer.running_mean_hh_l0[T:], before[T:])
    assert not torch.isclose(layer.running_mean_hh_l0[1:4], before[1:4]).any()
    assert "of 8 steps, 10 values at most" in report.changed[0].note


def test_what_draws_in_training_does_not_draw():
    layer, batches = recurrent("lstm", num_stat_steps=T, num_layers=2, dropout=0.5, zoneout=0.3), sequences()
    twin, drawn = copy.deepcopy(layer), torch.get_rng_state()
    for one in (layer, twin):
        normwise.recalibrate(one, batches, forward=call)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert_same_state(layer, state(twin))
    assert layer.stats_observer is None


class Stepper(nn.Module):
    """A cell, called step by step behind a BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(INPUT, dtype=torch.float64)
        self.cell = normwise.RNNCell(INPUT, HIDDEN, norm="batch", num_stat_steps=T, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        h = None
        for t, step in enumerate(self.norm(x.transpose(1, 2)).permute(2, 0, 1)):
            h = self.cell(step, h, step=t)
        return h


def test_a_cell_and_what_an_exact_pass_meets():
    model, x = Stepper(), torch.randn(9, T, INPUT, dtype=torch.float64) * 2 + 1
    normwise.recalibrate(model, x.split((2, 4, 3)), exact=True)
    rows = x.flatten(0, 1)
    standard = (x - rows.mean(0)) / (rows.var(0) + model.norm.eps).sqrt()
    summed = standard @ model.cell.weight_ih.detach().T
    assert_close(model.cell.running_mean_ih, summed.mean(0), kind="composed", count=9, scale=1.0)
    assert_close(model.cell.running_var_ih, summed.var(0), kind="composed", count=9, scale=1.0)


@pytest.mark.parametrize("layer", [nn.InstanceNorm1d, normwise.InstanceNorm1d])
@pytest.mark.parametrize("exact", [False, True])
def test_instance_norms_average_over_samples(layer, exact):
    x = torch.randn(9, 3, 7, dtype=torch.float64) * torch.rand(9, 1, 1) + torch.arange(9.0).view(-1, 1, 1)
    model = nn.Sequential(layer(3, track_running_stats=True, dtype=torch.float64))
    report = normwise.recalibrate(model, [x[:2], x[2], x[3:]], exact=exact)
    assert_close(model[0].running_mean, x.mean(2).mean(0), count=63, scale=9.0)
    assert_close(model[0].running_var, x.var(2).mean(0), count=63)
    assert report.changed[0].note == "averages over 9 samples"


def test_instance_norms_leave_out_samples_without_a_value():
    x, lengths = torch.randn(4, 3, 7), torch.tensor([7, 0, 1, 3])
    valid = torch.arange(7) < lengths[:, None]
    model = normwise.InstanceNorm1d(3, track_running_stats=True)
    normwise.recalibrate(model, [{"input": x.masked_fill(~valid[:, None], torch.nan), "lengths": lengths}])
    parts = [sample[:, :length].double() for sample, length in zip(x, lengths, strict=True)]
    means = torch.stack([part.mean(1) for part in parts if part.shape[1] > 0])
    variances = torch.stack([part.var(1) for part in parts if part.shape[1] > 1])
    assert_close(model.running_mean, means.mean(0), count=9, scale=1.0)
    assert_close(model.running_var, variances.mean(0), count=9)


def test_after_an_error_a_recurrent_layer_is_as_it_was():
    layer, (batch, *_) = recurrent(num_stat_steps=T).train(), sequences()
    before = state(layer)
    with pytest.raises(ValueError, match="no finite value in 1 batch:"):
        normwise.recalibrate(layer, [(batch[0] * torch.inf, batch[1])], forward=call)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        normwise.recalibrate(layer, [(torch.randn(T, 1, INPUT).double(), torch.tensor([T]))], forward=call)
    assert_same_state(layer, before)
    assert layer.stats_observer is None
