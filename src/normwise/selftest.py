"""`python -m normwise.selftest`: does this installation compute what it should, on this machine? Takes well under a
minute and needs torch alone; the command line is tried where its packages are there.

- **kernels**: on each instruction set that the processor and the library have, norms and recurrent layers run through
  the C++ kernels, forward and backward, against the reference in float64.
- **layers**: the same with whatever backend each call takes by itself here, and against torch.nn's namesakes.
- **threads**: on Linux, one OpenMP runtime is in the process, torch's.
- **command line**: `normwise info` and `normwise explain` start, and say what they should.

It finds what a broken build, a wrong library or an unfit machine does, not the last digit: that is the tests' work.
Exits with 0 if all that there is works, else with 1; with `--need-kernels`, missing kernels count as a failure.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import normwise
from normwise.backends.cpu import library
from normwise.words import counted

# The largest error that passes, as a share of the largest number that is right: 256 steps of rounding of float32, and 4
# of bfloat16, whose inner results are rounded, too. Right results stay below half of it, wrong ones are far above.
LIMITS = {torch.float32: 256 * torch.finfo(torch.float32).eps, torch.bfloat16: 4 * torch.finfo(torch.bfloat16).eps}
PACKAGES_OF_THE_COMMAND_LINE = ("numpy", "typer", "rich", "jinja2", "joblib")
OPENMP = re.compile(r"/lib(g|i)?omp[^/]*\.so|/libomp[^/]*\.dylib")
COMMAND = "import sys; from normwise_script import main; sys.argv[0] = 'normwise'; main()"


class Case(NamedTuple):
    """A layer, the shape of its input and what its call is given besides."""

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    options: Mapping[str, Any] = MappingProxyType({})
    memory_format: torch.memory_format = torch.contiguous_format
    twin: Callable[[], nn.Module] | None = None  # torch.nn's, which computes the same without options


LENGTHS = torch.tensor([9, 3, 1, 7, 5])
# Sizes that no vector width divides, so that the ends of rows are computed as well.
NORMS = [
    Case("LayerNorm", lambda: normwise.LayerNorm(211), (37, 211), twin=lambda: nn.LayerNorm(211)),
    Case("RMSNorm", lambda: normwise.RMSNorm(211), (37, 211), twin=lambda: nn.RMSNorm(211)),
    Case("LayerNorm, SiLU", lambda: normwise.LayerNorm(45, act="silu"), (37, 45)),
    Case("GroupNorm", lambda: normwise.GroupNorm(3, 21), (5, 21, 13, 7), twin=lambda: nn.GroupNorm(3, 21)),
    Case("GroupNorm, last", lambda: normwise.GroupNorm(3, 21), (5, 21, 13, 7), {}, torch.channels_last),
    Case("BatchNorm1d, lengths", lambda: normwise.BatchNorm1d(21), (5, 21, 9), {"lengths": LENGTHS}),
    Case("BatchNorm2d", lambda: normwise.BatchNorm2d(21), (5, 21, 13, 7), twin=lambda: nn.BatchNorm2d(21)),
    Case("BatchNorm2d, last", lambda: normwise.BatchNorm2d(21), (5, 21, 13, 7), {}, torch.channels_last),
    Case("BatchNorm2d, ReLU", lambda: normwise.BatchNorm2d(21, act="relu"), (5, 21, 13, 7)),
]
RECURRENT = [
    Case("LSTM", lambda: normwise.LSTM(19, 37), (9, 5, 19), {"lengths": LENGTHS}),
    Case("LSTM, two ways", lambda: normwise.LSTM(19, 37, bidirectional=True, norm="rms"), (9, 5, 19)),
    Case("GRU", lambda: normwise.GRU(19, 37), (9, 5, 19), {"lengths": LENGTHS}),
    Case("RNN", lambda: normwise.RNN(19, 37), (9, 5, 19)),
    Case("LSTM, no norm", lambda: normwise.LSTM(19, 37, norm=None), (9, 5, 19), twin=lambda: nn.LSTM(19, 37)),
]


def results(layer: nn.Module, x: Tensor, upstream: Tensor, options: Mapping[str, Any]) -> list[Tensor]:
    """The output and, by a given gradient of it, the gradients of the input and of every parameter."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = layer(x, **options)
    y = y[0] if isinstance(y, tuple) else y
    y.backward(upstream.to(y.dtype))
    gradients = [p.grad for p in layer.parameters() if p.grad is not None]
    assert x.grad is not None
    return [y.detach(), x.grad, *gradients]


def error(case: Case, dtype: torch.dtype, backend: str | None) -> float:
    """The largest error of a case by a backend (None: as it comes), each result measured by its largest number; of NaN
    it is infinite. The truth is the reference's in float64, of the same rounded input and parameters."""
    torch.manual_seed(0)
    layer = case.make()
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(torch.randn_like(p) / 8)
            p.data = p.data.to(dtype)  # running averages stay float32, as the kernels keep them
    x = torch.randn(case.shape).to(dtype)
    if x.dim() == 4:
        x = x.contiguous(memory_format=case.memory_format)
    exact = copy.deepcopy(layer).double()
    with normwise.backend("reference"), torch.no_grad():
        y = copy.deepcopy(exact)(x.double(), **case.options)
    upstream = torch.randn((y[0] if isinstance(y, tuple) else y).shape).to(dtype)
    with normwise.backend("reference"):
        truths = results(exact, x.double(), upstream, case.options)
    with normwise.backend(backend):
        found = results(layer, x, upstream, case.options)
    return _largest_error(found, truths)


def error_beside_torch(case: Case) -> float:
    """The same between a layer and torch.nn's with its parameters, in float32."""
    assert case.twin is not None
    torch.manual_seed(0)
    ours, theirs = case.make(), case.twin()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(case.shape)
    with torch.no_grad():
        y = copy.deepcopy(theirs)(x)
    upstream = torch.randn_like(y[0] if isinstance(y, tuple) else y)
    return _largest_error(results(ours, x, upstream, {}), results(theirs, x, upstream, {}))


def _largest_error(found: Sequence[Tensor], truths: Sequence[Tensor]) -> float:
    assert len(found) == len(truths)
    errors = [
        ((f.double() - t.double()).abs().max() / t.double().abs().max().clamp(min=1e-3)).item()
        for f, t in zip(found, truths, strict=True)
    ]
    return max(e if e == e else float("inf") for e in errors)  # NaN is unequal to itself


class Report:
    """Prints a line for each thing tried, and knows whether one failed."""

    failed = False

    def line(self, outcome: str, what: str, told: str) -> None:
        self.failed |= outcome == "FAILED"
        print(f"{outcome:<7} {what:<26} {told}", flush=True)

    def run(self, what: str, measure: Callable[[], Iterator[tuple[str, float, float]]]) -> None:
        """Tries each (name, error, limit) that `measure` gives; what it raises is a failure too."""
        count, worst, faults = 0, 0.0, []
        try:
            for name, found, limit in measure():
                count, worst = count + 1, max(worst, found / limit)
                if not found <= limit:
                    faults.append(f"{name} is off by {found:.1g} of its largest number, {limit:.1g} is allowed")
        except Exception as exception:  # whatever it is: the others are to be tried as well
            faults.append(f"after {counted(count, 'call')}: {type(exception).__name__}: {exception}")
        told = f"{counted(count, 'layer')}, forward and backward; largest error {worst:.0%} of what is allowed"
        self.line("FAILED" if faults else "ok", what, "; ".join(faults) or told)


def _cases_of(backend: str | None) -> Iterator[tuple[str, float, float]]:
    for dtype in LIMITS:
        for case in NORMS + RECURRENT:
            yield f"{case.name} in {str(dtype).removeprefix('torch.')}", error(case, dtype, backend), LIMITS[dtype]


def _cases_beside_torch() -> Iterator[tuple[str, float, float]]:
    for case in NORMS + RECURRENT:
        if case.twin is not None:
            yield case.name, error_beside_torch(case), LIMITS[torch.float32]


def _runs_here(level: str) -> bool:
    """Switches to that instruction set, if there is one."""
    try:
        library.use_isa(level)
    except ValueError:
        return False
    return True


def try_kernels(report: Report, needed: bool) -> None:
    """Each instruction set of the library that runs here; those that do not are named."""
    why_not = library.missing()
    if why_not is not None:
        report.line("FAILED" if needed else "absent", "kernels", why_not)
        return
    before = library.isa()
    for level in library.ISA_LEVELS:
        if _runs_here(level):
            report.run(f"kernels, {level}", lambda: _cases_of("cpu"))
        else:
            report.line("absent", f"kernels, {level}", "this processor or this build of the library lacks it")
    library.use_isa(before)


def try_layers(report: Report) -> None:
    report.run("layers", lambda: _cases_of(None))
    report.run("layers beside torch.nn's", _cases_beside_torch)


def try_threads(report: Report, maps: Iterable[str]) -> None:
    """By the memory map of this process: one OpenMP runtime, whose threads torch and the library share."""
    mapped = {line.split()[-1] for line in maps if "/" in line}
    runtimes = sorted(path for path in mapped if OPENMP.search(path))
    if len(runtimes) > 1:
        told = f"two OpenMP runtimes, whose threads wait for each other's: {', '.join(runtimes)}"
        report.line("FAILED", "threads", told)
    else:
        report.line("ok", "threads", f"{torch.get_num_threads()}, of {' '.join(runtimes) or 'no OpenMP runtime'}")


def try_command_line(report: Report) -> None:
    """Two commands, each in a process of its own, as a user starts them."""
    lacking = [name for name in PACKAGES_OF_THE_COMMAND_LINE if find_spec(name) is None]
    if lacking:
        report.line("absent", "command line", f"needs {', '.join(lacking)}: pip install 'normwise[lab]'")
        return
    for arguments in (["info", "--json"], ["explain"]):
        done = subprocess.run([sys.executable, "-c", COMMAND, *arguments], capture_output=True, text=True, timeout=120)
        fault = None
        if done.returncode != 0:
            fault = f"exits with {done.returncode}: {done.stderr.strip()[-300:]}"
        elif "--json" in arguments and json.loads(done.stdout)["versions"]["normwise"] != normwise.__version__:
            fault = "is another version's"
        elif not done.stdout.strip():
            fault = "prints nothing"
        report.line("FAILED" if fault else "ok", f"normwise {arguments[0]}", fault or "runs")


def main(arguments: Sequence[str] | None = None) -> int:
    """Everything, a line each; the status to exit with."""
    parser = argparse.ArgumentParser("python -m normwise.selftest", description="Does this installation compute right?")
    parser.add_argument("--need-kernels", action="store_true", help="fail where the C++ kernels are missing")
    needed = parser.parse_args(arguments).need_kernels
    start, report = time.monotonic(), Report()
    print(f"normwise {normwise.__version__} from {normwise.__path__[0]}, torch {torch.__version__}")
    try_kernels(report, needed)
    try_layers(report)
    if Path("/proc/self/maps").exists():
        try_threads(report, Path("/proc/self/maps").read_text(encoding="utf-8").splitlines())
    try_command_line(report)
    verdict = "something is wrong, see the lines that say FAILED" if report.failed else "all that is here works"
    print(f"{verdict} ({time.monotonic() - start:.0f} s)")
    return int(report.failed)


if __name__ == "__main__":
    sys.exit(main())
