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
    png: Annotated[
        Path | None,
        typer.Option(metavar="DIR", file_okay=False, help="Also write every figure to DIR as a PNG."),
    ] = None,
) -> None:
    """Make a page of the stored runs: claims with their verdicts, then each task's numbers and curves.

    DIR/report.html is one file that needs no network: for a screen, a phone or the printer. --png writes the figures
    for papers.
    """
    from normwise.lab.pictures import write_pictures
    from normwise.lab.report import write_report
    from normwise.lab.store import Store
    from normwise.lab.study import study

    with Store(out / "runs.sqlite", make=False) as store:
        found = study(store)
    page = write_report(found.rows, found.tasks, out / "report.html", judged=found.judged, references=found.references)
    typer.echo(f"Report: {page} ({page.stat().st_size / 1e6:.1f} MB)")
    if found.left_out:
        typer.echo(
            f"{found.left_out} stored runs are not drawn: they are of another version, or train for longer or shorter."
        )
    if png:
        typer.echo(f"Figures: {len(write_pictures(found.rows, found.tasks, png))} in {png}")
