"""Install what an extra of normwise requires, without building its C++ library once more as `pip install -e` would.

    python scripts/install_extra.py models -c constraints.txt

The first argument is the extra, the others are pip's.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import requires

from packaging.requirements import Requirement

if __name__ == "__main__":
    extra, *options = sys.argv[1:]
    wanted = [
        f"{one.name}{one.specifier}"
        for one in map(Requirement, requires("normwise") or [])
        if one.marker is not None and one.marker.evaluate({"extra": extra}) and not one.marker.evaluate({"extra": ""})
    ]
    if not wanted:
        sys.exit(f"normwise has no extra {extra!r}, or it requires nothing")
    sys.exit(subprocess.run([sys.executable, "-m", "pip", "install", *options, *wanted], check=False).returncode)
