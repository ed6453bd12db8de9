"""The `normwise` script: runs the subcommands and turns whatever ends them into a status, told in one line."""

from __future__ import annotations

import sys
import traceback
from typing import NoReturn

from normwise.cli.status import BAD_INPUT, FAULT, INTERRUPTED, USER_CODE, UserCodeRaised
from normwise.diagnosis.errors import DiagnosisError
from normwise.lab.errors import LabError, StoreError, WorkerError

# Which extra installs what is imported; a test keeps it equal to pyproject.toml.
EXTRAS = {
    **dict.fromkeys(("numpy", "scipy", "typer", "rich", "jinja2", "joblib", "altair", "vl_convert"), "lab"),
    "distributed": "cluster",
    "pyarrow": "parquet",
}


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line on `arguments` (default: `sys.argv[1:]`) and exit."""
    try:
        # Only here, so that without typer there is still somebody to say what to install.
        from normwise.cli.app import app

        app(arguments, prog_name="normwise")
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except Exception as error:
        _fail(error)
    sys.exit(0)


def _fail(error: Exception) -> NoReturn:
    status, message = BAD_INPUT, str(error)
    if isinstance(error, UserCodeRaised):
        status = USER_CODE
        print(error.trace, file=sys.stderr)
    elif isinstance(error, WorkerError):
        status = USER_CODE
    elif isinstance(error, ModuleNotFoundError) and (package := (error.name or "").partition(".")[0]) in EXTRAS:
        message = f"the package {package!r} is not installed; run: pip install 'normwise[{EXTRAS[package]}]'"
    elif not isinstance(error, (LabError, StoreError, DiagnosisError)):
        status, message = FAULT, "this is a fault of normwise: please report it, with the lines above"
        traceback.print_exception(type(error), error, error.__traceback__)
    print(f"normwise: error: {message}", file=sys.stderr)
    sys.exit(status)
