"""The numbers of `normwise explain` against the definitions, computed here with the statistics module."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace

import pytest

from normwise.lab.errors import LabError
from normwise.lab.explain import explain
from normwise.lab.table import PEOPLE, Table


def standardized(numbers: list[float], eps: float) -> list[float]:
    mean, variance = statistics.fmean(numbers), statistics.pvariance(numbers)
    return [(number - mean) / math.sqrt(variance + eps) for number in numbers]


@pytest.fixture(scope="module")
def people():
    return explain(PEOPLE)


def test_batch_norm_standardizes_each_column(people):
    columns = list(zip(*PEOPLE.values, strict=True))
    assert people.batch_norm.mean == pytest.approx([statistics.fmean(c) for c in columns], rel=1e-14)
    assert people.batch_norm.variance == pytest.approx([statistics.pvariance(c) for c in columns], rel=1e-14)
    for output, column in zip(zip(*people.batch_norm.output, strict=True), columns, strict=True):
        assert list(output) == pytest.approx(standardized(column, people.eps), rel=1e-12)
    assert people.batch_norm.output_mean == pytest.approx([0] * 3, abs=1e-14)
    assert people.batch_norm.output_variance == pytest.approx([1] * 3, rel=1e-6)


@pytest.mark.parametrize("scale", [1e150, 1e100, 1e-3])
def test_numbers_of_any_size_have_exact_outputs(scale):
    """The same numbers in another unit, from 1e-3 on: eps does not count beside their variance."""
    values = [[scale, 1e-3], [-scale, 2e-3], [scale / 2, 5e-3]]
    made = explain(Table(["a", "b"], ["1", "2", "3"], values))
    column = [1, -1, 0.5]
    expected = standardized(column, 0 if scale > 1 else made.eps / scale**2)
    assert [row[0] for row in made.batch_norm.output] == pytest.approx(expected, rel=1e-12)
    assert made.batch_norm.variance[0] == pytest.approx(statistics.pvariance(column) * scale**2, rel=1e-12)
    assert all(error <= 1e-12 * scale for error in made.batch_norm_undone.error)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("number", [1.1e150, -1e200, 1e308])
def test_numbers_whose_variance_is_too_large_for_a_float_are_named(number):
    table = Table(["a", "b"], ["line 2", "line 3", "line 4"], [[1, 2], [3, number], [5, 6]])
    with pytest.raises(LabError, match=r"line 3, b: -?1(\.1)?e\+\d+ is too large, for variances are squares: "):
        explain(table)


def test_layer_norm_standardizes_each_row(people):
    for i, row in enumerate(PEOPLE.values):
        assert people.layer_norm.mean[i] == pytest.approx(statistics.fmean(row), rel=1e-14)
        assert people.layer_norm.variance[i] == pytest.approx(statistics.pvariance(row), rel=1e-14)
        assert people.layer_norm.output[i] == pytest.approx(standardized(row, people.eps), rel=1e-12)


def test_gain_and_bias_give_back_the_input_of_batch_norm_and_one_row_of_layer_norm(people):
    undone = people.batch_norm_undone
    assert undone.bias == people.batch_norm.mean
    assert undone.gain == pytest.approx([math.sqrt(v + people.eps) for v in people.batch_norm.variance], rel=1e-14)
    for output, row in zip(undone.output, PEOPLE.values, strict=True):
        assert output == pytest.approx(row, rel=1e-13)
    assert max(undone.error) < 1e-11

    assert people.layer_norm_undone.output[0] == pytest.approx(PEOPLE.values[0], rel=1e-13)
    assert people.layer_norm_undone.error[0] < 1e-11
    assert min(people.layer_norm_undone.error[1:]) > 1


def test_counts(people):
    batch, layer = people.batch_norm_counts, people.layer_norm_counts
    assert (batch.statistics, batch.kept, batch.learned) == (6, 6, 6)
    assert (layer.statistics, layer.kept, layer.learned) == (10, 0, 6)


@pytest.mark.parametrize("drop", range(5))
def test_without_a_row_batch_norm_moves_and_layer_norm_does_not(drop):
    without = explain(PEOPLE, drop).without
    others = [row for i, row in enumerate(PEOPLE.values) if i != drop]
    assert without.row == PEOPLE.rows[drop]
    assert without.rows == [name for name in PEOPLE.rows if name != without.row]
    expected = [standardized(column, 1e-5) for column in zip(*others, strict=True)]
    for output, row in zip(without.batch_norm, zip(*expected, strict=True), strict=True):
        assert output == pytest.approx(row, rel=1e-12)
    assert min(without.batch_norm_change) > 0.01
    assert without.layer_norm_change == [0, 0, 0, 0]


def test_the_last_row_is_dropped_by_default(people):
    assert people.without.row == "Emma"


def test_a_constant_column_comes_out_as_zeros():
    table = Table(["a", "b"], ["x", "y", "z"], [[1, 5], [2, 5], [4, 5]])
    assert [row[1] for row in explain(table).batch_norm.output] == [0, 0, 0]


def test_too_small_a_table_is_refused():
    with pytest.raises(LabError, match=r"2 rows; expected at least 3"):
        explain(replace(PEOPLE, rows=["a", "b"], values=PEOPLE.values[:2]))
    with pytest.raises(LabError, match="1 column of numbers; expected at least 2"):
        explain(replace(PEOPLE, columns=["a"], values=[[v[0]] for v in PEOPLE.values]))
