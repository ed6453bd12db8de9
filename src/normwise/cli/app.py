"""The subcommands put together. Each lives in its own file and imports what it runs only when it is called."""

from __future__ import annotations

from typing import Annotated

import typer

import normwise
from normwise.cli.claims import claims
from normwise.cli.compare import compare
from normwise.cli.diagnose import diagnose
from normwise.cli.explain import explain
from normwise.cli.info import info
from normwise.cli.report import report
from normwise.cli.reproduce import reproduce
from normwise.cli.runs import app as runs

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,  # plain text: the same in a terminal, a log and a pipe
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(short_help="Train the same network with different norms on real data.")(compare)
app.command(short_help="Test claims about normalization by training runs.")(claims)
app.command(short_help="Show what normalization does in your model.")(diagnose)
app.command(short_help="Show what BatchNorm and LayerNorm do to a small table.")(explain)
app.command(short_help="Show what runs on this machine, and why.")(info)
app.command(short_help="Make a page of the stored runs, and figures.")(report)
app.command(short_help="Repeat a paper's experiment at full size.")(reproduce)
app.add_typer(runs, name="runs")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"normwise {normwise.__version__}")
        raise typer.Exit


@app.callback()
def normwise_command(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Normalization for PyTorch: compare norms on real data, diagnose a model, see what runs here.

    Exit status: 0 done; 1 diagnose --strict found something; 2 bad arguments or input, or a missing package; 3 your
    code raised, with its traceback; 4 a fault of normwise; 130 interrupted.
    """
