from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest

from normwise.cli.main import main


class Ran(NamedTuple):
    status: int | str | None
    out: str
    err: str


@pytest.fixture
def normwise_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ran]:
    """Runs `normwise ARGUMENTS` in this process, in a terminal of 80 columns, as the installed script would."""
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments: str) -> Ran:
        stdout, descriptor = sys.stdout, os.dup(1)
        try:
            with pytest.raises(SystemExit) as ended:
                main(list(arguments))
        finally:  # --json keeps them to the end of the process
            sys.stdout = stdout
            os.dup2(descriptor, 1)
            os.close(descriptor)
        return Ran(ended.value.code, *capsys.readouterr())

    return run
