"""Install what normwise and one of its extras require, and not normwise itself, whose C++ library would be built.

    python scripts/install_extra.py models -c constraints.txt

The first argument is the extra, the others are pip's. It needs nothing but pip.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    from pip._vendor import tomli as tomllib

if __name__ == "__main__":
    extra, *options = sys.argv[1:]
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = project["optional-dependencies"].get(extra)
    if not wanted:
        sys.exit(f"normwise has no extra {extra!r}, or it requires nothing")
    if any(one.startswith("normwise[") for one in wanted):
        sys.exit(f"the extra {extra!r} names other extras of normwise: `pip install -e .[{extra}]` has them all")
    command = [sys.executable, "-m", "pip", "install", *options, *project["dependencies"], *wanted]
    sys.exit(subprocess.run(command, check=False).returncode)
