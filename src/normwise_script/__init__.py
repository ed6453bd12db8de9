"""Where the `normwise` script starts. It is no part of the package, because importing any part of that loads torch,
which takes a second or more: Ctrl-C in that second has to end the script without a traceback from inside an import.
"""

from __future__ import annotations

import os
import signal
from typing import NoReturn


def main() -> NoReturn:
    """Run the command line; Ctrl-C while it loads ends the process at once, with status 130."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # and not ignored, as after nohup
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    from normwise.cli.main import main as run

    signal.signal(signal.SIGINT, before)
    run()
