"""`normwise diagnose`: what normalization does in a user's model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from normwise.cli.json_output import AsJson, print_json
from normwise.cli.options import OUT
from normwise.cli.status import FOUND
from normwise.cli.user_code import calling

if TYPE_CHECKING:
    from normwise.diagnosis import Diagnosis

EXAMPLE = "examples/diagnose_me.py:make"


def diagnose(
    source: Annotated[
        str,
        typer.Argument(
            metavar="FILE.py:make",
            help="make() returns (model, batches, loss) or (model, batches, loss, optimizer); batches yields "
            "(inputs, target) or dicts with labels, and loss(output, target) is a scalar, or None where the model "
            "computes its own.",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", file_okay=False, help="Where diagnosis.html is written.")] = OUT,
    max_batches: Annotated[int, typer.Option(metavar="N", min=1, help="Use at most N batches.")] = 8,
    max_seconds: Annotated[
        float | None, typer.Option(metavar="S", help="Start nothing new after S seconds, and list what was left out.")
    ] = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CODE[:LAYERS]",
            help="Silence a code, everywhere or in layers whose names fit a pattern: NW005, NW001:encoder.*; may be "
            "repeated. [tool.normwise.diagnose] in pyproject.toml can silence codes too.",
        ),
    ] = None,
    strict: Annotated[
        bool,
        typer.Option("--strict", help="For CI: exit with 1 if anything is found (with 3 if your code raised)."),
    ] = False,
    json: AsJson = False,
) -> None:
    """Show what normalization does in your model, and what is wrong with it.

    A few batches are enough, and nothing is trained; with an optimizer a few steps are watched as well. Afterwards
    the model is as it was before. Findings come first, each with its cause and its cure; then a line for each layer.
    The page DIR/diagnosis.html has all numbers, layer by layer.
    """
    from normwise.diagnosis.page import write_page
    from normwise.diagnosis.table import as_text

    found = _diagnosed(source, max_batches, max_seconds, ignore or [])
    page = out / "diagnosis.html"
    try:
        write_page(found, page)
    except OSError as error:
        raise typer.BadParameter(f"{page} cannot be written: {error.strerror or error}", param_hint="'--out'") from None
    if json:
        print_json(found.to_json(indent=2))
    else:
        typer.echo(as_text(found))
        typer.echo(f"Page: {page}")
    if strict and found.findings:
        raise typer.Exit(FOUND)


def _diagnosed(source: str, max_batches: int, max_seconds: float | None, ignore: list[str]) -> Diagnosis:
    from normwise.diagnosis import diagnose as diagnosis_of
    from normwise.diagnosis import silence
    from normwise.diagnosis.pace import Pace
    from normwise.lab import user_file

    path, function = user_file.parsed(source, EXAMPLE)
    # What is wrong with the settings is said before the user's code runs, which may take long.
    silence.checked(ignore)
    silence.from_pyproject(Path.cwd())
    Pace(max_seconds, lambda *_: None)
    with calling(source):
        model, batches, loss, optimizer = _given(source, user_file.called(path, function))
        return diagnosis_of(
            model,
            batches,
            loss=loss,
            optimizer=optimizer,
            max_batches=max_batches,
            max_seconds=max_seconds,
            progress=sys.stderr.isatty(),
            ignore=ignore,
        )


def _given(source: str, made: Any) -> tuple[Any, Any, Any, Any]:
    from normwise.diagnosis import DiagnosisError

    if not isinstance(made, tuple) or len(made) not in (3, 4):
        what = f"a tuple of {len(made)}" if isinstance(made, tuple) else type(made).__name__
        raise DiagnosisError(
            f"{source} returned {what}: expected (model, batches, loss) or (model, batches, loss, optimizer), as in "
            f"{EXAMPLE}"
        )
    return (*made, None)[:4]
