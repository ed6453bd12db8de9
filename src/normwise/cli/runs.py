"""`normwise runs`: what a store holds, in the terminal and for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from normwise.cli.json_output import AsJson, print_json
from normwise.cli.options import OUT
from normwise.words import counted

if TYPE_CHECKING:
    from normwise.lab.store import Run, Store

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="List, show and export stored runs.",
    short_help="List, show and export stored runs.",
)

Out = Annotated[Path, typer.Option("--out", metavar="DIR", file_okay=False, help="Where runs.sqlite is.")]
OfTask = Annotated[str | None, typer.Option("--task", metavar="NAME", help="Only runs of this task.")]
OfNorm = Annotated[str | None, typer.Option("--norm", metavar="NAME", help="Only runs with this norm.")]
OfStatus = Annotated[
    str | None, typer.Option("--status", metavar="WORD", help="Only these: done, undefined or diverged.")
]


def _store(out: Path) -> Store:
    from normwise.lab.store import Store

    return Store(out / "runs.sqlite", make=False)


@app.command("list", short_help="List the stored runs, one per line.")
def list_runs(
    out: Out = OUT, task: OfTask = None, norm: OfNorm = None, status: OfStatus = None, json: AsJson = False
) -> None:
    """List the stored runs, one per line, in the order in which they finished.

    Accuracy is the final one, on the held-out cases; loss is that of the last training batch. Where a task was run in
    several versions (its file edited, another torch), a column numbers them, and a line below says what differs.
    """
    from normwise.lab.runs import chosen, head, versions
    from normwise.lab.strict_json import to_json

    with _store(out) as store:
        runs = chosen(store.index(), task=task, norm=norm, status=status)
    if json:
        print_json(to_json([head(run) for run in runs], indent=2))
        return
    numbers, differences = versions(runs)
    lines = [COLUMNS, *(_cells(run) for run in runs)]
    if differences:
        lines = [
            (*line[:2], version, *line[2:])
            for line, version in zip(lines, ["version", *(numbers[run.key] for run in runs)], strict=True)
        ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    typer.echo(f"\n{counted(len(runs), 'run')} in {out / 'runs.sqlite'}")
    for difference in differences:
        typer.echo(difference)


def _cells(run: Run) -> tuple[str, ...]:
    one = run.identity
    accuracy, loss = (run.series[name].values[-1] if name in run.series else None for name in SHOWN)
    return (
        run.key[:8],
        one["task"],
        one["norm"],
        str(one["batch_size"]),
        f"{one['learning_rate']:g}",
        str(one["seed"]),
        str(one["steps"]),
        run.status,
        "" if accuracy is None else f"{100 * accuracy:.1f}%",
        "" if loss is None else f"{loss:.4f}",
    )


COLUMNS = ("key", "task", "norm", "batch", "rate", "seed", "steps", "status", "accuracy", "loss")
SHOWN = ("final/accuracy", "train/loss")


@app.command(short_help="Show one run and its series.")
def show(
    key: Annotated[str, typer.Argument(metavar="KEY", help="The run's key, or its beginning.")],
    series: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Print this series, step by step. May be repeated.")
    ] = None,
    out: Out = OUT,
    json: AsJson = False,
) -> None:
    """Show one run: what determined it, how it ended, and each of its series with its last value."""
    from normwise.lab.errors import unknown
    from normwise.lab.runs import find, head
    from normwise.lab.strict_json import to_json

    with _store(out) as store:
        run = find(store, key)
    for name in series or ():
        if name not in run.series:
            raise unknown("series", name, run.series)
    wanted = series or run.series
    if json:
        curves = {name: vars(run.series[name]) for name in wanted}
        print_json(to_json({**head(run), "identity": run.identity, "series": curves}, indent=2))
    elif series:
        for name in series:
            typer.echo(name)
            for step, value in zip(run.series[name].steps, run.series[name].values, strict=True):
                typer.echo(f"  {step:>8} {value:.6g}")
    else:
        identity = {**run.identity, **{f"  {name}": value for name, value in run.identity["settings"].items()}}
        del identity["settings"]
        about = {**identity, "status": run.status, "reason": run.reason, "machine": run.machine}
        typer.echo(f"{run.key}\n")
        for name, value in {**about, "finished (UTC)": run.finished}.items():
            if value != "":
                typer.echo(f"{name:<16} {value}")
        typer.echo(f"\n{'series':<40} {'values':>7} {'last':>12}")
        for name, curve in run.series.items():
            typer.echo(f"{name:<40} {len(curve.values):>7} {curve.values[-1]:>12.6g}")


@app.command(short_help="Write the runs as CSV or Parquet.")
def export(
    csv: Annotated[
        Path | None, typer.Option(metavar="FILE", dir_okay=False, help="Write comma-separated text.")
    ] = None,
    parquet: Annotated[
        Path | None, typer.Option(metavar="FILE", dir_okay=False, help="Write Parquet; needs normwise[parquet].")
    ] = None,
    summary: Annotated[
        bool, typer.Option("--summary", help="One row per run, with the last value of each series as JSON.")
    ] = False,
    out: Out = OUT,
    task: OfTask = None,
    norm: OfNorm = None,
    status: OfStatus = None,
) -> None:
    """Write the runs to a file: a row for each value of each series, or with --summary a row for each run."""
    from normwise.lab.runs import RUN_COLUMNS, VALUE_COLUMNS, chosen, one_a_run, one_a_value, write_csv, write_parquet

    if csv is None and parquet is None:
        raise typer.BadParameter("say where to: --csv FILE, --parquet FILE or both")
    with _store(out) as store:
        runs = chosen(store.index(), task=task, norm=norm, status=status)
        for path, write in ((csv, write_csv), (parquet, write_parquet)):
            if path is not None:
                rows = one_a_run(runs) if summary else one_a_value(store, runs)
                count = write(rows, RUN_COLUMNS if summary else VALUE_COLUMNS, path)
                typer.echo(f"{path}: {counted(count, 'row')} of {counted(len(runs), 'run')}")
