"""What BatchNorm and LayerNorm do to one small table, as plain numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from normwise.backends.reference import moments
from normwise.lab.errors import LabError
from normwise.lab.table import Table
from normwise.nn import BatchNorm1d, LayerNorm
from normwise.words import counted

Matrix = list[list[float]]

LARGEST = 1e150
"""Of a number in the table: the squared distances of millions of such rows still add up to a float64."""


@dataclass(frozen=True)
class Standardized:
    """A layer's output as it starts out (gain 1, bias 0), with the statistics that it subtracted and divided by.

    Statistics are one a column (BatchNorm) or one a row (LayerNorm); variances are biased (divided by the count).
    """

    mean: list[float]
    variance: list[float]
    output: Matrix
    output_mean: list[float]
    output_variance: list[float]


@dataclass(frozen=True)
class GainAndBias:
    """The output with gain and bias, one a column each, set so as to undo the standardizing.

    BatchNorm: each column's own sqrt(variance + eps) and mean, which give the input back. LayerNorm: the first row's
    for all columns, which give back that row and no other, since its statistics belong to rows.
    `error` is the largest |output - input| of each row.
    """

    gain: list[float]
    bias: list[float]
    output: Matrix
    error: list[float]


@dataclass(frozen=True)
class Counts:
    """How many numbers a layer has: `statistics` it computes for this table (means plus variances), `kept` of them
    from batch to batch for inference (running averages), and `learned` gains plus biases."""

    statistics: int
    kept: int
    learned: int


@dataclass(frozen=True)
class WithoutRow:
    """The outputs of the rows that stay when one is taken away, and the largest change in each of them."""

    row: str
    rows: list[str]
    batch_norm: Matrix
    layer_norm: Matrix
    batch_norm_change: list[float]
    layer_norm_change: list[float]


@dataclass(frozen=True)
class Explanation:
    table: Table
    eps: float
    batch_norm: Standardized
    layer_norm: Standardized
    batch_norm_undone: GainAndBias
    layer_norm_undone: GainAndBias
    batch_norm_counts: Counts
    layer_norm_counts: Counts
    without: WithoutRow


def explain(table: Table, drop: int = -1) -> Explanation:
    """Run both layers (in training mode, float64) on the whole table, and without row number `drop` (from 0).

    Raises:
        LabError: fewer than 3 rows (so that 2 stay, as BatchNorm needs) or 2 columns (as LayerNorm needs); or a number
            beyond ``LARGEST``, which has no variance in float64.
        IndexError: no such row.
    """
    if len(table.rows) < 3:
        raise LabError(
            f"the table has {counted(len(table.rows), 'row')}; expected at least 3, since one is taken away "
            "and BatchNorm needs two to have a variance"
        )
    if len(table.columns) < 2:
        raise LabError(
            f"the table has {len(table.columns)} column of numbers; expected at least 2 separated by commas, "
            "since LayerNorm standardizes along the row"
        )
    for name, numbers in zip(table.rows, table.values, strict=True):
        for column, number in zip(table.columns, numbers, strict=True):
            if abs(number) > LARGEST:
                raise LabError(
                    f"{name}, {column}: {number:g} is too large, for variances are squares: expected at most "
                    f"{LARGEST:g} in magnitude; give the column in another unit"
                )
    x = torch.tensor(table.values, dtype=torch.float64)
    features = len(table.columns)
    batch_norm = BatchNorm1d(features, dtype=x.dtype)
    layer_norm = LayerNorm(features, dtype=x.dtype)
    plain_batch, plain_layer = batch_norm(x), layer_norm(x)

    keep = [i for i in range(len(table.rows)) if i != range(len(table.rows))[drop]]
    fewer_batch, fewer_layer = batch_norm(x[keep]), layer_norm(x[keep])

    return Explanation(
        table=table,
        eps=batch_norm.eps,
        batch_norm=_standardized(x, plain_batch, axis=0),
        layer_norm=_standardized(x, plain_layer, axis=1),
        batch_norm_undone=_undone(batch_norm, x, *_sigma_and_mean(x, 0, batch_norm.eps)),
        layer_norm_undone=_undone(layer_norm, x, *_sigma_and_mean(x[:1], 1, layer_norm.eps)),
        batch_norm_counts=_counts(batch_norm, statistics=2 * features),
        layer_norm_counts=_counts(layer_norm, statistics=2 * len(table.rows)),
        without=WithoutRow(
            row=table.rows[drop],
            rows=[table.rows[i] for i in keep],
            batch_norm=fewer_batch.tolist(),
            layer_norm=fewer_layer.tolist(),
            batch_norm_change=_largest(fewer_batch - plain_batch[keep]),
            layer_norm_change=_largest(fewer_layer - plain_layer[keep]),
        ),
    )


def _standardized(x: Tensor, y: Tensor, axis: int) -> Standardized:
    given, out = moments(x, [axis]), moments(y, [axis])
    return Standardized(
        mean=given.mean.flatten().tolist(),
        variance=given.var.flatten().tolist(),
        output=y.tolist(),
        output_mean=out.mean.flatten().tolist(),
        output_variance=out.var.flatten().tolist(),
    )


def _sigma_and_mean(x: Tensor, axis: int, eps: float) -> tuple[Tensor, Tensor]:
    mean, var, _ = moments(x, [axis])
    return (var + eps).sqrt().flatten(), mean.flatten()


def _undone(layer: BatchNorm1d | LayerNorm, x: Tensor, gain: Tensor, bias: Tensor) -> GainAndBias:
    with torch.no_grad():
        layer.weight.copy_(gain)
        layer.bias.copy_(bias)
        y = layer(x)
    return GainAndBias(layer.weight.tolist(), layer.bias.tolist(), y.tolist(), _largest(y - x))


def _counts(layer: torch.nn.Module, statistics: int) -> Counts:
    return Counts(
        statistics=statistics,
        kept=sum(buffer.numel() for name, buffer in layer.named_buffers() if name.startswith("running_")),
        learned=sum(parameter.numel() for parameter in layer.parameters()),
    )


def _largest(difference: Tensor) -> list[float]:
    """The largest magnitude in each row."""
    magnitudes: list[float] = difference.abs().amax(dim=1).tolist()
    return magnitudes
