"""`--json`: standard output carries one JSON document and nothing else."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Annotated, TextIO

import typer

STDOUT, STDERR = 1, 2
_document: TextIO | None = None
"""Where the document goes; None before `--json` is read."""


def _reserve_stdout(wanted: bool) -> bool:
    """From here to the end of the process, what anything else writes to standard output goes to standard error.

    That is `print`, but also what compiled code writes to the descriptor, and child processes, which inherit it. It is
    not undone: threads, exit handlers and C's own buffers may write after the document.
    """
    global _document
    if wanted and sys.stdout is not None:  # None where it is closed
        _document = sys.stdout
        with contextlib.suppress(OSError, ValueError):  # a captured stream has no descriptor, a closed one no copy
            sys.stdout.flush()
            if sys.stdout.fileno() == STDOUT:
                _document = os.fdopen(os.dup(STDOUT), "w", encoding="ascii")
            os.dup2(STDERR, STDOUT)
        sys.stdout = sys.stderr
    return wanted


AsJson = Annotated[bool, typer.Option("--json", callback=_reserve_stdout, help="Print JSON alone, for programs.")]


def print_json(text: str) -> None:
    """The one document that a command prints under `--json`."""
    typer.echo(text, file=_document)
