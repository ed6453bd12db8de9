"""python -m benchmarks gpu [--json FILE] [--minutes N] [--dry] [--keep-going]

Compiles the kernels in a pool of processes, measures what the device can do, proves every kernel against the reference
in float64 on the CPU (fresh memory full of NaN, the same bits 20 times), and only then takes times: recurrent layers
against cuDNN's without norm, the loop over steps and a compiled cell; norms against ATen, Inductor and a copy of the
same bytes, eager and replayed from a CUDA graph. What did not fit in the time is listed as not measured. Needs torch,
Triton and this source tree (PYTHONPATH=src), and nothing else. At the end it prints the tables as Markdown;
`python -m benchmarks table FILE` prints those of a file again.

Exit code: 0; 1 where a result is wrong or a phase died, after which nothing is timed unless --keep-going; 2 where there
is no GPU.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.gpu.table import markdown

Results = dict[str, Any]

# A phase is a file beside this one with a function `run(device, log)`; it ends after this share of the time, counted
# from the start: what an earlier one leaves, the next one has.
PHASES = {"build": 100 / 540, "device": 115 / 540, "correct": 210 / 540, "recurrent": 380 / 540, "norms": 1.0}
PROOF = "correct"
TIMED = ("recurrent", "norms")
# A phase stops by itself between two cases; so much later it hangs, and is killed.
GRACE_SECONDS = 30.0
DRY_MINUTES = 60.0
NO_GPU = (
    "torch finds no GPU here: run this where there is one, or try the whole script on the CPU, by Triton's interpreter "
    "and without times, with --dry."
)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here as JSON")
    parser.add_argument("--minutes", type=float, default=9.0, metavar="N", help="for all of it; default: 9")
    parser.add_argument("--dry", action="store_true", help="on the CPU with tiny shapes and without times, as a test")
    parser.add_argument(
        "--keep-going", action="store_true", help="take times of what is right even if something is not"
    )
    parser.add_argument("--phases", nargs="+", choices=list(PHASES), default=list(PHASES), metavar="PHASE",
                        help=f"only these, of {', '.join(PHASES)}")  # fmt: skip
    parser.add_argument("--only", default="", metavar="TEXT", help="only cases whose name contains TEXT")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.minutes <= 0:
        parser.error(f"--minutes: expected more than 0, got {options.minutes:g}")
    if options.child is not None:
        _run_phase(options.phases[0], options.child, options.seconds, options.dry, options.only)
        return 0
    missing = None if options.dry else _missing()
    if missing is not None:
        print(missing, file=sys.stderr)
        return 2
    results = _run_all(options)
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    print("\n" + markdown(results))
    return 1 if is_red(results) else 0


def _missing() -> str | None:
    """Why nothing can be measured here, in a sentence with the cure."""
    import torch

    if not torch.cuda.is_available():
        return NO_GPU
    if find_spec("triton") is None:
        return "Triton is not installed here: pip install triton, in the version that this torch names as its own."
    return None


def _run_all(options: argparse.Namespace) -> Results:
    start, total = time.monotonic(), 60 * (DRY_MINUTES if options.dry else options.minutes)
    results: Results = {"kind": "gpu", "dry": options.dry, "minutes": options.minutes, "machine": {}, "phases": {}}
    for phase, share in PHASES.items():
        if phase not in options.phases:
            continue
        if phase in TIMED and is_red(results) and not options.keep_going:
            results["phases"][phase] = {"stopped": "a result before this was wrong: see above"}
            continue
        seconds = start + share * total - time.monotonic()
        print(f"\n## {phase}, {max(seconds, 0):.0f} s at most", flush=True)
        results["phases"][phase] = found = _in_child(phase, seconds, options)
        results["machine"] |= found.pop("machine", {})
    results["seconds"] = round(time.monotonic() - start, 1)
    return results


def is_red(results: Results) -> bool:
    """Whether something was wrong, or a phase died: that of the proof also if a case was left out."""
    phases = results["phases"].values()
    wrong = any(figure.get("error", 0) > 1 or figure.get("failed") for p in phases for figure in p.get("figures", ()))
    unproven = bool(results["phases"].get(PROOF, {}).get("not_measured"))
    return wrong or unproven or any(p.get("died") for p in phases)


def _in_child(phase: str, seconds: float, options: argparse.Namespace) -> Results:
    """What a phase wrote, and how it ended."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lines.json"
        path.touch()
        command = [sys.executable, "-m", "benchmarks", "gpu", "--child", str(path), "--phases", phase]
        command += ["--seconds", str(max(seconds, 0.0)), "--only", options.only, *(["--dry"] if options.dry else [])]
        # Of its own group: a phase may have started processes.
        child = subprocess.Popen(command, env=_environment(options.dry), start_new_session=True)
        try:
            code = child.wait(max(seconds, 0.0) + GRACE_SECONDS)
            died = None if code == 0 else f"exit code {code}"
        except subprocess.TimeoutExpired:
            died = "did not come back in time"
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        lines = [json.loads(line) for line in path.read_text().splitlines()]
    found: Results = {"figures": [], "not_measured": [], "machine": {}}
    last = None
    for line in lines:
        last = line.get("begun", last)
        for key in ("figures", "not_measured"):
            found[key] += line.get(key, [])
        found["machine"] |= line.get("machine", {})
    found["died"] = died if died is None or last is None else f"{died}, in {last}"
    found["seconds"] = round(time.monotonic() - start, 1)
    if died is not None:
        print(f"{phase}: {found['died']}", flush=True)
    return found


def _environment(dry: bool) -> dict[str, str]:
    # The same in every phase, or what was compiled in one would not be found in another.
    env = dict(os.environ) | {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
    env.pop("TRITON_INTERPRET", None)
    return env | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""} if dry else env


def _run_phase(phase: str, path: Path, seconds: float, dry: bool, only: str) -> None:
    from benchmarks.gpu.clock import Device
    from benchmarks.gpu.log import Log

    module = importlib.import_module(f"benchmarks.gpu.{phase}")
    module.run(Device(dry), Log(path, time.monotonic() + seconds, only))
