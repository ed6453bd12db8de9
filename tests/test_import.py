"""`import normwise` costs torch and next to nothing more."""

from __future__ import annotations

import json
import os
import subprocess
import sys

# Runs in a fresh interpreter: sys.modules and the processor's time around `import normwise`, torch being there already.
# On a machine with nothing else to do that is the clock's time.
MEASURE = """
import json, sys, time
import torch
before = set(sys.modules)
start = time.process_time()
import normwise
seconds = time.process_time() - start
print(json.dumps({"seconds": seconds, "modules": sorted(set(sys.modules) - before)}))
"""


def measured() -> dict:
    # With bytecode, as pip installs it: the first process writes what is missing, whatever this one is told.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    ran = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True, env=env)
    return json.loads(ran.stdout)


def test_import_loads_torch_and_nothing_else_from_outside_the_standard_library():
    outside = {name.partition(".")[0] for name in measured()["modules"]} - sys.stdlib_module_names
    assert outside <= {"normwise", "torch"}


def test_import_leaves_the_command_line_and_the_lab_alone():
    rooms = {name.split(".")[1] for name in measured()["modules"] if name.startswith("normwise.")}
    assert not rooms & {"cli", "lab", "diagnosis"}


def test_import_adds_at_most_50_ms_to_that_of_torch():
    """The best of up to eight: other processes can only make it slower. Stops at the first that is quick enough."""
    seconds = []
    while len(seconds) < 8:
        seconds.append(measured()["seconds"])
        if seconds[-1] <= 0.050:
            return
    raise AssertionError(f"import normwise took {min(seconds) * 1000:.0f} ms at best beyond torch's own import")
