from __future__ import annotations

import math

import pytest
import torch

from normwise.backends.recurrence import Recurrence, Weights
from normwise.backends.reference.recurrence import Step, recurrence
from normwise.measure import time_steps
from normwise.measure.time_steps import StepMeans, gate_inputs, summed_inputs


def of_two_batches():
    """Three sequences of 3, 1 and 2 steps; beyond its length a sequence may hold anything."""
    means = StepMeans()
    values = torch.tensor([[1.0, 4.0, 9.0], [7.0, math.nan, math.inf]]).T
    means.add(values, torch.tensor([[True, True, True], [True, False, False]]).T)
    means.add(torch.tensor([[1.0], [12.0]]), torch.ones(2, 1, dtype=torch.bool))
    return means


def test_the_mean_is_over_the_sequences_that_are_still_running():
    means = of_two_batches()
    assert means.mean().tolist() == [3, 8, 9]
    assert means.overall() == pytest.approx((1 + 4 + 9 + 7 + 1 + 12) / 6)


@pytest.mark.parametrize(("fewest", "steps"), [(1, 3), (2, 2), (3, 1), (100, 1)])
def test_it_ends_where_too_few_sequences_go_on_or_any_has_ended_where_there_are_few(monkeypatch, fewest, steps):
    monkeypatch.setattr(time_steps, "FEWEST_SEQUENCES", fewest)
    assert of_two_batches().steps() == steps


def test_nothing_has_no_steps():
    assert StepMeans().steps() == 0
    assert StepMeans().overall() == 0


def test_sums_that_stand_for_no_sequences_have_a_mean_as_well():
    means = StepMeans()
    means.add_sums(torch.tensor([4.0, 2.0]), torch.tensor([1, 1]))
    means.add_sums(torch.tensor([2.0]), torch.tensor([1]))
    assert means.mean().tolist() == [3, 2]


@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
def test_what_gates_see_of_a_plain_cell(cell):
    """At the first step from a state of 0 it is W_ih x."""
    gates = {"rnn": 1, "lstm": 4, "gru": 3}[cell]
    x, h = torch.randn(1, 5, 3), torch.zeros(5, 2)
    weights = Weights(torch.randn(gates * 2, 3), torch.randn(gates * 2, 2), *[None] * (len(Weights._fields) - 2))
    tape: list[Step] = []
    recurrence(x, h, h if cell == "lstm" else None, weights, Recurrence(cell, None), tape=tape)
    expected = x[0] @ weights.weight_ih.T
    torch.testing.assert_close(summed_inputs(tape)[0], expected)
    torch.testing.assert_close(gate_inputs(tape, gates - 1)[0], expected[:, -2:])
