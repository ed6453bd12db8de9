"""Run as a program by tests/lab/test_killed.py: sweeps on one store, two at a time, killed at random moments.

It forks from a process that has loaded torch once, so that a kill costs milliseconds. Prints how many runs were
stored at each kill; any assertion that fails ends it with a traceback.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

from normwise.lab import sweep as module
from normwise.lab.run import Result, Series
from normwise.lab.spec import Spec, expand
from normwise.lab.store import Store

KILLS, LONGEST = 20, 0.25
SPECS = expand("mlp", seeds=250, norms=["batch", "layer"], batch_sizes=[8, 4], learning_rates=[0.1], steps=4)


def fake(spec: Spec, kept: Path | None) -> Result:
    """A run of a millisecond, whose numbers tell which run it was."""
    time.sleep(0.001)
    steps = list(range(200))
    values = [float(spec.seed * 1000 + spec.batch_size + step) for step in steps]
    return Result("done", "", {name: Series(steps, values) for name in (f"{spec.norm}/a", f"{spec.norm}/b")})


def start(path: Path, log: Path) -> int:
    """A process that sweeps and writes each run's key down after it is told that it is stored; returns its id."""
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        told = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        with Store(path) as store:
            module.sweep(
                SPECS, store, jobs=1, finished=lambda spec, _: os.write(told, f"{spec.key()}\n".encode()) and None
            )
        status = 0
    finally:
        os._exit(status)


def check(path: Path, log: Path, keys: dict[str, Spec]) -> int:
    """What was told is there, what is there is whole; returns how many runs that is."""
    if not path.exists():
        return 0
    told = log.read_text().split() if log.exists() else []
    with Store(path) as store:
        stored = store.keys()
        assert set(told) <= stored, "a run that was stored is lost"
        assert len(stored) <= len(set(told)) + 2 * KILLS, "more was stored than was told and in flight"
        for run in store.runs(stored):
            expected = fake(keys[run.key], None)
            assert {name: curve.values for name, curve in run.series.items()} == {
                name: series.values for name, series in expected.series.items()
            }, "a run is not whole"
    return len(stored)


def main(folder: Path) -> None:
    path, log = folder / "runs.sqlite", folder / "told"
    module.run = fake
    keys = {spec.key(): spec for spec in SPECS}
    moments = random.Random(7)
    counts = []
    for _ in range(KILLS):
        writers = [start(path, log), start(path, log)]
        time.sleep(moments.uniform(0, LONGEST))
        for process in writers:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
        counts.append(check(path, log, keys))
    print(*counts)
    assert counts == sorted(counts)
    assert counts[0] < counts[-1] < len(SPECS), "the kills missed the sweeps: change LONGEST or the number of SPECS"
    writers = [start(path, log), start(path, log)]
    for process in writers:
        assert os.waitpid(process, 0)[1] == 0
    assert check(path, log, keys) == len(SPECS)


main(Path(sys.argv[1]))
