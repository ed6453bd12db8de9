"""Options that several subcommands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
