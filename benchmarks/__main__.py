"""python -m benchmarks [SUITE ...] [--json FILE] [--threads N ...]

Each suite runs in two processes of its own: with malloc told to keep memory (so that the ratios are those of the
kernels, not of the system handing out pages), and with the allocator's defaults (what a user sees).
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SUITES = ("norms", "fused", "recurrent", "memory")
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "17179869184"}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"of {', '.join(_present())}; default: all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here as JSON")
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1], metavar="N", help="default: 2, then 1")
    parser.add_argument("--only", default="", metavar="TEXT", help="only cases whose name contains TEXT")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    suites = options.suites or _present()
    unknown = [suite for suite in suites if suite not in _present()]
    if unknown:
        parser.error(f"unknown suite {unknown[0]!r}: expected one of {', '.join(_present())}")
    if options.child is not None:
        options.child.write_text(json.dumps(_run(suites, options.threads, options.only)))
        return 0

    results: dict[str, Any] = {}
    for allocator, environment in (("memory kept", KEEP_MEMORY), ("default", {})):
        # One core count is enough to see what page faults cost.
        threads = options.threads if allocator == "memory kept" else options.threads[:1]
        print(f"\n## allocator: {allocator}", flush=True)
        results[allocator] = _in_child(suites, threads, options.only, environment)
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    figures = [figure for part in results.values() for figure in part["figures"]]
    return 1 if any(figure["error"] > 1 for figure in figures) else 0


def _present() -> list[str]:
    """The suites that exist as files beside this one."""
    return [suite for suite in SUITES if (Path(__file__).parent / f"{suite}.py").exists()]


def _in_child(suites: Sequence[str], threads: Sequence[int], only: str, environment: dict[str, str]) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figures.json"
        numbers = ["--threads", *map(str, threads)]
        command = [sys.executable, "-m", "benchmarks", *suites, *numbers, "--only", only, "--child", str(path)]
        clean = {key: value for key, value in os.environ.items() if key not in KEEP_MEMORY}
        subprocess.run(command, check=True, env=clean | environment)
        return json.loads(path.read_text())


def _run(suites: Sequence[str], threads: Sequence[int], only: str) -> dict[str, Any]:
    import torch

    from benchmarks import machine
    from benchmarks.measure import Probe, compare

    about = machine.describe()
    print(machine.line(about), flush=True)
    figures = []
    for count in threads:
        torch.set_num_threads(count)
        probe = Probe()
        for suite in suites:
            print(f"\n### {suite}, {count} thread{'s' if count > 1 else ''}: ours/theirs (20%..80%)", flush=True)
            torch.manual_seed(0)
            for case in importlib.import_module(f"benchmarks.{suite}").cases():
                if only not in case.name:
                    continue
                figure = {"suite": suite, "case": case.name, "against": case.against, "threads": count}
                figure |= {"must": case.must, "aim": case.aim, "error": case.error()}
                if figure["error"] <= 1:
                    ratio = compare(case.ours, case.theirs, case.limit, probe)
                    figure |= ratio._asdict() | {"limit_name": case.limit_name}
                    if ratio.limit is not None:
                        figure["limit"] = ratio.limit * case.limit_scale
                figures.append(figure)
                print(_line(figure), flush=True)
    return {"machine": about, "figures": figures}


def _line(figure: dict[str, Any]) -> str:
    name = f"{figure['case']:<46}"
    if figure["error"] > 1:
        return f"{name} WRONG: {figure['error']:.1f} times the allowed error; no speed is given for a wrong result"
    text = f"{name} {figure['median']:.2f} ({figure['p20']:.2f}..{figure['p80']:.2f})"
    text += f"  {figure['ours'] * 1e6:9.1f} us"
    if figure["limit"] is not None:
        text += f"  limit {figure['limit'] / figure['theirs']:.2f}"
    if figure["must"] is not None and figure["threads"] > 1:
        text += f"  must {figure['must']:.2f} {'ok' if figure['median'] <= figure['must'] else 'SHORT'}"
    if not figure["quiet"]:
        text += "  (the machine was busy)"
    return text


if __name__ == "__main__":
    sys.exit(main())
