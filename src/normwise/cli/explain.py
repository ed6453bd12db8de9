"""`normwise explain`: the difference between BatchNorm and LayerNorm, in numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from normwise.cli.json_output import AsJson, print_json
from normwise.words import counted

if TYPE_CHECKING:
    from normwise.lab.explain import Explanation

# Widths in characters: a row's name, four columns and two more aside fit a terminal of 80.
LABEL, CELL, MOST_COLUMNS, MOST_ROWS = 12, 10, 4, 12


def explain(
    csv: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            exists=True,
            dir_okay=False,
            readable=True,
            help="Your own table instead of the five people: comma-separated numbers; a header line and a first "
            "column of names are optional.",
        ),
    ] = None,
    drop: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Which row to take away, counted from 1. Default: the last."),
    ] = None,
    json: AsJson = False,
) -> None:
    """Show what BatchNorm and LayerNorm do to a small table of people.

    Both subtract a mean and divide by a standard deviation. BatchNorm takes them down each column, over the rows of
    the batch; LayerNorm along each row. The rest follows, and is printed here in numbers: what gain and bias can
    undo, how many statistics there are, and who notices when one row is taken away.
    """
    from normwise.lab.explain import explain as explain_table
    from normwise.lab.strict_json import to_json
    from normwise.lab.table import PEOPLE, read_csv

    table = PEOPLE if csv is None else read_csv(csv)
    if drop is not None and drop > len(table.rows):
        raise typer.BadParameter(f"{drop}: the table has {counted(len(table.rows), 'row')}", param_hint="'--drop'")
    explanation = explain_table(table, drop=-1 if drop is None else drop - 1)
    if json:
        print_json(to_json(asdict(explanation), indent=2))
    else:
        typer.echo(as_text(explanation))


def as_text(e: Explanation) -> str:
    """The five parts, at most 80 characters wide."""
    return "\n".join(
        line.rstrip()
        for part in (_batch_norm(e), _layer_norm(e), _gain_and_bias(e), _counts(e), _without_row(e))
        for line in part
    )


def _batch_norm(e: Explanation) -> list[str]:
    rows, columns, norm = e.table.rows, e.table.columns, e.batch_norm
    return [
        f"The table: {counted(len(rows), 'row')}, {counted(len(columns), 'column')}",
        "",
        *grid(columns, rows, e.table.values),
        "",
        "1. BatchNorm: down each column",
        "",
        f"Every column has one mean and one variance, taken over all {len(rows)} rows",
        f"(the sum of squared distances from the mean, divided by {len(rows)}):",
        "",
        *grid(columns, ["mean", "variance"], [norm.mean, norm.variance]),
        "",
        f"Output = (number - mean) / sqrt(variance + {e.eps:g}), with those of the column:",
        "",
        *grid(columns, rows, norm.output),
        *grid(columns, ["its mean", "variance"], [norm.output_mean, norm.output_variance])[1:],
        "",
    ]


def _layer_norm(e: Explanation) -> list[str]:
    rows, columns, norm = e.table.rows, e.table.columns, e.layer_norm
    return [
        "2. LayerNorm: along each row",
        "",
        f"Every row has one mean and one variance, taken over its own {len(columns)} numbers:",
        "",
        *grid(columns, rows, e.table.values, {"mean": norm.mean, "variance": norm.variance}),
        "",
        "Output, by the same formula with those of the row:",
        "",
        *grid(columns, rows, norm.output, {"its mean": norm.output_mean, "variance": norm.output_variance}),
        "",
        "A row's mean mixes the columns whatever their units, so LayerNorm suits features",
        "on one footing, such as the units of a hidden layer.",
        "",
    ]


def _gain_and_bias(e: Explanation) -> list[str]:
    rows, columns, batch, layer = e.table.rows, e.table.columns, e.batch_norm_undone, e.layer_norm_undone
    return [
        "3. Gain and bias",
        "",
        "Both layers end with  gain * output + bias,  one learned gain and bias a column.",
        "Gain 1 and bias 0, where they start, only standardize: the tables above.",
        "Gain = sqrt(variance + eps) and bias = mean give BatchNorm's input back:",
        "",
        *grid(columns, ["gain", "bias"], [batch.gain, batch.bias]),
        "",
        *grid(columns, rows, batch.output, {"off by": batch.error}),
        "",
        "LayerNorm cannot be undone so: its statistics belong to rows, its gain and bias",
        f"to columns. With those of {rows[0]} for all (gain {_cell(layer.gain[0])}, bias {_cell(layer.bias[0])}),",
        f"only {rows[0]} comes back:",
        "",
        *grid(columns, rows, layer.output, {"off by": layer.error}),
        "",
    ]


def _counts(e: Explanation) -> list[str]:
    batch, layer = e.batch_norm_counts, e.layer_norm_counts

    def line(what: str, of_batch: int, batch_note: str, of_layer: int, layer_note: str) -> str:
        left = f"{of_batch} {batch_note if of_batch else ''}"
        return f"  {what:<28}{left:<25}{of_layer} {layer_note if of_layer else ''}"

    return [
        "4. How many numbers each layer has for this table",
        "",
        f"  {'':<28}{'BatchNorm':<25}LayerNorm",
        line("means and variances", batch.statistics, "(2 a column)", layer.statistics, "(2 a row)"),
        line("of those kept as averages", batch.kept, "(2 a column)", layer.kept, "(2 a row)"),
        line("learned gains and biases", batch.learned, "(2 a column)", layer.learned, "(2 a column)"),
        "",
    ]


def _without_row(e: Explanation) -> list[str]:
    without, columns = e.without, e.table.columns
    return [
        f"5. What changes when one row is taken away: {without.row}",
        "",
        "BatchNorm's output of the others, whose own numbers are what they were:",
        "",
        *grid(columns, without.rows, without.batch_norm, {"moved by": without.batch_norm_change}),
        "",
        "LayerNorm's output of the others:",
        "",
        *grid(columns, without.rows, without.layer_norm, {"moved by": without.layer_norm_change}),
        "",
        "BatchNorm's output for one row depends on who else is in the batch (which is why",
        "it keeps running averages and uses those in eval mode); LayerNorm's does not.",
    ]


def grid(
    columns: Sequence[str],
    rows: Sequence[str],
    values: Sequence[Sequence[float]],
    aside: Mapping[str, Sequence[float]] | None = None,
) -> list[str]:
    """Lines of a table with a header; `aside` adds columns of its own behind a bar. Says what it leaves out."""
    aside = aside or {}
    wide, shown = columns[:MOST_COLUMNS], min(len(rows), MOST_ROWS)
    lines = [_line("", [_fit(c, CELL - 1) for c in wide], list(aside))]
    for i in range(shown):
        numbers = [_cell(value) for value in values[i][:MOST_COLUMNS]]
        lines.append(_line(_fit(rows[i], LABEL), numbers, [_cell(extra[i]) for extra in aside.values()]))
    hidden = [
        f"{count} more {what}"
        for count, what in ((len(rows) - shown, "rows"), (len(columns) - len(wide), "columns"))
        if count > 0
    ]
    if hidden:
        lines.append(f"  (and {' and '.join(hidden)}: --json prints all)")
    return lines


def _line(label: str, cells: Sequence[str], aside: Sequence[str]) -> str:
    bar = " |" if aside else ""
    return f"  {label:<{LABEL}}" + "".join(f"{c:>{CELL}}" for c in cells) + bar + "".join(f"{c:>{CELL}}" for c in aside)


def _fit(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "~"


def _cell(value: float) -> str:
    """Two decimals where they say something; rounding noise around 0 is 0.00."""
    if abs(value) < 1e-12 or 0.005 <= abs(value) < 1e6:
        return f"{round(value, 2) + 0.0:.2f}"  # + 0.0 turns -0.0 into 0.0
    return f"{value:.1e}"
