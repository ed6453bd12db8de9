"""The `normwise` script: runs the subcommands and turns a user's mistake into one line and a status.

Exit status: 0 done; 1 `diagnose --strict` found something; 2 bad arguments, bad input or a missing package; 130
interrupted with Ctrl-C.
"""

from __future__ import annotations

import sys
from typing import NoReturn

from normwise.diagnosis.errors import DiagnosisError
from normwise.lab.errors import LabError, StoreError

# Which extra installs a package; a test keeps it equal to pyproject.toml.
EXTRAS = {
    **dict.fromkeys(("numpy", "typer", "rich", "jinja2", "joblib"), "lab"),
    "distributed": "cluster",
    "pyarrow": "parquet",
}


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line on `arguments` (default: `sys.argv[1:]`) and exit."""
    try:
        # Only here, so that without typer there is still somebody to say what to install.
        from normwise.cli.app import app

        app(arguments, prog_name="normwise")
    except (LabError, StoreError, DiagnosisError) as error:
        _fail(str(error))
    except ModuleNotFoundError as missing:
        package = (missing.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        _fail(f"the package {package!r} is not installed; run: pip install 'normwise[{EXTRAS[package]}]'")
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)


def _fail(message: str) -> NoReturn:
    print(f"normwise: error: {message}", file=sys.stderr)
    sys.exit(2)
