"""Options that several subcommands take."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer

Value = TypeVar("Value")

OUT = Path("normwise-out")
"""The folder of runs and pages, unless --out says otherwise."""

Seeds = Annotated[int, typer.Option("--seeds", metavar="N", min=1, help="Number of seeds, 0 to N-1.")]
Jobs = Annotated[
    int | None, typer.Option("--jobs", metavar="N", min=1, help="Processes. Default: one per core.", show_default=False)
]
Scheduler = Annotated[
    str | None,
    typer.Option(
        "--scheduler", metavar="ADDRESS", help="Train on the workers of this Dask scheduler: tcp://host:8786."
    ),
]


def listed(text: str | None, kind: Callable[[str], Value], option: str) -> list[Value] | None:
    """The values of an option that takes several, separated by commas; None if it was not given."""
    if text is None:
        return None
    try:
        return [kind(part.strip()) for part in text.split(",")]
    except ValueError:
        wanted = {int: "integers", float: "numbers"}.get(kind, "names")  # type: ignore[call-overload]
        raise typer.BadParameter(f"{text!r} is not a list of {wanted} separated by commas", param_hint=option) from None
