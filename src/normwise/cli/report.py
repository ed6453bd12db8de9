"""`normwise report`: what a store says, on one page and as pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from normwise.cli.options import OUT


def report(
    out: Annotated[
        Path, typer.Option(metavar="DIR", file_okay=False, help="Where runs.sqlite is and report.html goes.")
    ] = OUT,
    task: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Draw this task alone, to DIR/report-NAME.html. Can be given several times."),
    ] = None,
    png: Annotated[
        Path | None,
        typer.Option(metavar="DIR", file_okay=False, help="Also write every figure to DIR as a PNG."),
    ] = None,
) -> None:
    """Make a page of the stored runs: claims with their verdicts, then each task's numbers and curves.

    DIR/report.html is one file that needs no network: for a screen, a phone or the printer. Where it would have more
    than eight parts, the tasks that only claims need share one, in brief; --task draws all that a task's runs have
    recorded. --png writes the figures for papers.
    """
    from normwise.lab.pictures import write_pictures
    from normwise.lab.report import anchor, write_report
    from normwise.lab.store import Store
    from normwise.lab.study import study

    with Store(out / "runs.sqlite", make=False) as store:
        found = study(store, task or ())
    name = "-".join(["report", *(anchor(one) for one in dict.fromkeys(task or ()))])
    page = write_report(
        found.rows,
        found.tasks,
        out / f"{name}.html",
        judged=found.judged,
        references=found.references,
        notes=found.notes,
        brief=not task,
    )
    typer.echo(f"Report: {page} ({page.stat().st_size / 1e6:.1f} MB)")
    for one, notes in found.notes.items():
        typer.echo(f"{one}: {' '.join(notes)}")
    if png:
        typer.echo(f"Figures: {len(write_pictures(found.rows, found.tasks, png))} in {png}")
