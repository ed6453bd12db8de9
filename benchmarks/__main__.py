"""python -m benchmarks [SUITE ...] [--json FILE] [--threads N ...] [--quick]
python -m benchmarks table FILE
python -m benchmarks gpu [--json FILE] [--dry] ...; see python -m benchmarks gpu --help

Measures each suite in processes of its own, one for each setting of the allocator. Times are taken twice: with malloc
told to keep memory (so that the ratios are those of the kernels, not of the system handing out pages), and with the
allocator's defaults (what a user sees). Memory is measured with malloc giving back at once what is freed. Whole steps
of `models` are measured with the defaults, on the processor's own level and as on one with AVX2 alone. `table` prints
the figures of a FILE that --json wrote as Markdown.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ALLOCATORS = {
    "memory kept": {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "17179869184"},
    "default": {},
    "memory returned": {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"},
}
# Levels of the processor, for both sides: normwise, torch's kernels and the libraries that torch calls.
AVX2 = {
    "NORMWISE_ISA": "avx2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}
LEVELS = {"own level": {}, "AVX2": AVX2}
ENVIRONMENTS = ALLOCATORS | LEVELS
TIMES, BYTES = ("memory kept", "default"), ("memory returned",)
# What takes longer with the first count of threads is not measured with another: all suites are to take ten minutes.
SLOW_SECONDS = 0.05
QUICK_PAIRS = 5
# A suite is a file beside this one with a function `cases`; here stands in which environments it is measured, ...
SUITES = {
    "norms": TIMES,
    "fused": TIMES,
    "recurrent": TIMES,
    "rivals": TIMES[:1],
    "monitor": TIMES[:1],
    "memory": BYTES,
    "models": tuple(LEVELS),
}
# ... and which suites are measured with each count of threads, where times are: the others with the first. Not all by
# default: compiling the nets alone takes longer than the other suites.
EACH_COUNT = ("norms", "fused", "recurrent", "models")
ALONE = ("models",)


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["gpu"]:
        from benchmarks.gpu.command import main as on_gpu

        return on_gpu(arguments[1:])
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    suites = _present()
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"of {', '.join(suites)}; default: all but models")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here as JSON")
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1], metavar="N", help="default: 2, then 1")
    parser.add_argument("--only", default="", metavar="TEXT", help="only cases whose name contains TEXT")
    parser.add_argument(
        "--quick", action="store_true", help=f"models: {QUICK_PAIRS} pairs, one count of threads, no torch.compile"
    )
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.suites[:1] == ["table"] and len(options.suites) == 2:
        from benchmarks.gpu import table as of_gpu
        from benchmarks.table import markdown

        results = json.loads(Path(options.suites[1]).read_text())
        print(of_gpu.markdown(results) if results.get("kind") == "gpu" else markdown(results))
        return 0
    wanted = options.suites or [suite for suite in suites if suite not in ALONE]
    unknown = [suite for suite in wanted if suite not in suites]
    if unknown:
        parser.error(f"unknown suite {unknown[0]!r}: expected one of {', '.join(suites)}, or: table FILE")
    if options.child is not None:
        options.child.write_text(json.dumps(_run(wanted, options.threads, options.only, options.quick)))
        return 0

    start = time.monotonic()
    results: dict[str, Any] = {}
    for environment in ENVIRONMENTS:
        some = [suite for suite in wanted if environment in SUITES[suite]]
        if not some:
            continue
        print(f"\n## {'level' if environment in LEVELS else 'allocator'}: {environment}", flush=True)
        why_not = _unmeasured(environment)
        if why_not is not None:
            print(f"unmeasured: {why_not}", flush=True)
            results[environment] = next(iter(results.values())) | {"figures": [], "unmeasured": why_not}
            continue
        # Of what page faults and saved tensors cost, one count of threads tells enough.
        each = environment == "memory kept" or (environment in LEVELS and not options.quick)
        threads = options.threads if each else options.threads[:1]
        results[environment] = _in_child(some, threads, options.only, environment, options.quick)
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    print(f"\n{time.monotonic() - start:.0f} s")
    return 1 if any(figure["error"] > 1 for part in results.values() for figure in part["figures"]) else 0


def _present() -> list[str]:
    """The suites that exist as files beside this one."""
    return [suite for suite in SUITES if (Path(__file__).parent / f"{suite}.py").exists()]


def _unmeasured(environment: str) -> str | None:
    """Why a level of the processor cannot be measured apart from its own."""
    if environment != "AVX2":
        return None
    import torch

    own = torch.backends.cpu.get_cpu_capability()
    if own == "AVX2":
        return "it is the processor's own level; it lacks AVX-512, which is unmeasured"
    return None if own == "AVX512" else f"the processor lacks it: its own level is {own}"


def _in_child(suites: Sequence[str], threads: Sequence[int], only: str, environment: str, quick: bool) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figures.json"
        numbers = ["--threads", *map(str, threads)]
        command = [sys.executable, "-m", "benchmarks", *suites, *numbers, "--only", only, "--child", str(path)]
        clean = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
        command += ["--quick"] if quick else []
        subprocess.run(command, check=True, env=clean | ENVIRONMENTS[environment])
        return json.loads(path.read_text())


def _run(suites: Sequence[str], threads: Sequence[int], only: str, quick: bool = False) -> dict[str, Any]:
    import torch

    from benchmarks import machine
    from benchmarks.measure import PAIRS, Probe

    about = machine.describe()
    print(machine.line(about), flush=True)
    figures: list[dict[str, Any]] = []
    slow: set[str] = set()
    for count in threads:
        torch.set_num_threads(count)
        probe = Probe()
        for suite in suites:
            if count != threads[0] and suite not in EACH_COUNT:
                continue
            module = importlib.import_module(f"benchmarks.{suite}")
            print(
                f"\n### {suite}, {count} thread{'s' if count > 1 else ''}: {(module.__doc__ or '').splitlines()[0]}",
                flush=True,
            )
            torch.manual_seed(0)
            more: dict[str, Any] = {}
            if suite == "models":
                more = {"pairs": QUICK_PAIRS if quick else PAIRS, "compiles": count == threads[0] and not quick}
            for case in module.cases(**more):
                if only not in case.name:
                    continue
                if case.name in slow:
                    print(f"{case.name:<46} takes too long on fewer threads", flush=True)
                    continue
                figure = {"suite": suite, "case": case.name, "threads": count} | case.figure(probe)
                figures.append(figure)
                if suite != "models" and figure.get("ours", 0.0) > SLOW_SECONDS:
                    slow.add(case.name)
                wrong = f"WRONG: {figure['error']:.1f} times the allowed error; of a wrong result nothing else is said"
                print(f"{case.name:<46} {wrong if figure['error'] > 1 else case.line(figure)}", flush=True)
    return {"machine": about, "figures": figures}


if __name__ == "__main__":
    sys.exit(main())
