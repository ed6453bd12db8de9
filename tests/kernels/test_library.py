"""Finding, loading and sharing: the library, its instruction sets, its threads."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import normwise
from normwise.backends.cpu import library, norms
from support import instruction_sets
from support.backends import ran
from support.instruction_sets import LEVELS_FOR_NORMS
from support.kernel_calls import (
    channels_backward,
    channels_forward,
    groups_backward,
    groups_forward,
    rows_backward,
    rows_forward,
)


@pytest.fixture(autouse=True)
def no_level_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests say themselves which instruction set the environment asks for."""
    monkeypatch.delenv("NORMWISE_ISA", raising=False)


TESTS = str(Path(__file__).parents[1])

needs_library = pytest.mark.skipif(library.missing() is not None, reason=str(library.missing()))


def python(code: str, **environment: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        text=True,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": TESTS, **environment},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@needs_library
def test_memory_that_no_kernel_writes_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fixture reaches results and statistics."""
    nothing = SimpleNamespace(nw_rows_forward=lambda arguments: 0, nw_channels_forward=lambda arguments: 0)
    monkeypatch.setattr(library, "functions", nothing)
    x, w = torch.ones(4, 3), torch.ones(3)
    made = (*rows_forward(x, 3, w, w, 1e-5, residual=x), *channels_forward(x, None, None, w, w, True, 0.1, 1e-5)[:2])
    assert all(t.isnan().all() for t in made)


@needs_library
def test_unknown_codes_are_refused_before_anything_is_written() -> None:
    handle = library.load().library
    assert handle is not None
    arguments = norms.ROWS_FORWARD.pack(*(0,) * 10, 1, 1, 1, 1e-5, 9, 1, 0, 1, 0, 0)
    assert handle.nw_rows_forward(arguments) == 1


def test_a_missing_library_is_told_with_its_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "NAME", "libelsewhere.so")
    loaded = library.load.__wrapped__()
    assert loaded.library is None
    assert "without its compiled library libelsewhere.so" in loaded.why_not
    assert "install a C++ compiler" in loaded.why_not


def test_windows_has_no_kernels_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "NAME", "libelsewhere.so")
    monkeypatch.setattr(library.platform, "system", lambda: "Windows")
    assert "Microsoft's compiler lacks the vector extensions" in library.load.__wrapped__().why_not


def test_a_library_for_another_processor_alone_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `make compare` compiles one, on a machine that lacks its only instruction set."""
    handle = SimpleNamespace(
        nw_isa=lambda: None, nw_abi=lambda: library.ABI, nw_use_isa=lambda name: 1, nw_struct_size=lambda which: -1
    )
    monkeypatch.setattr(library, "_find", lambda: Path("lib"))
    monkeypatch.setattr(library.ctypes, "CDLL", lambda path: handle)
    told = library.load.__wrapped__().why_not
    assert "was built for another processor alone" in told
    assert "reinstall normwise" in told


@needs_library
def test_every_instruction_set_that_torch_sees_is_compiled() -> None:
    """A build by `make compare` has the best one alone: tests of the others would all be skipped."""
    seen = torch.backends.cpu.get_cpu_capability()
    expected = {"AVX512": ["avx512", "avx2"], "AVX2": ["avx2"]}.get(seen, [])
    assert [*expected, "baseline"] == instruction_sets.USABLE_FOR_NORMS


def test_a_library_that_does_not_load_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "NAME", "memory.py")
    assert "does not load here" in library.load.__wrapped__().why_not


@needs_library
def test_a_library_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "ABI", -1)
    assert "another version of normwise" in library.load.__wrapped__().why_not


@needs_library
@pytest.mark.parametrize("level", [*library.ISA_LEVELS, "sse9"])
def test_environment_forces_an_instruction_set(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = library.isa()
    handle = library.load().library
    assert handle is not None
    runs_here = handle.nw_use_isa(level.encode()) == 0
    monkeypatch.setenv("NORMWISE_ISA", level)
    loaded = library.load.__wrapped__()
    try:
        if runs_here:
            assert loaded.library.nw_isa() == level.encode()
        else:
            assert loaded.library is None
            usable = ", ".join(known for known in library.ISA_LEVELS if handle.nw_use_isa(known.encode()) == 0)
            assert f"NORMWISE_ISA={level} cannot run here: set it to one of {usable}, to none for" in loaded.why_not
    finally:
        library.use_isa(before)


@needs_library
def test_unknown_instruction_set_is_named() -> None:
    with pytest.raises(ValueError, match=r"'sse9' cannot run here: expected one of avx512_amx, .*, or none for"):
        library.use_isa("sse9")


def test_the_environment_turns_the_kernels_off_without_a_warning() -> None:
    """The library is not even loaded, and normwise works as where it was not built."""
    told = python(
        "import torch, normwise, warnings; from normwise.backends.cpu import library; warnings.simplefilter('error')\n"
        "layers = normwise.LayerNorm(1024), normwise.BatchNorm1d(1024), normwise.GroupNorm(4, 1024)\n"
        "x = torch.randn(64, 1024)\n"
        "[layer(x).sum().backward() for layer in layers]; normwise.LSTM(4, 4)(x[:, None, :4])\n"
        "print(library.isa(), (library.missing() is None), library.load().library, library.missing())",
        NORMWISE_ISA="none",
    )
    assert told == "none False None NORMWISE_ISA=none turns the C++ kernels off: unset it to have them"


@needs_library
def test_the_kernels_can_be_turned_off_and_on_again() -> None:
    before, layer, x = library.isa(), normwise.BatchNorm1d(8), torch.randn(16, 8)
    with ran() as found:
        layer(x)
    assert found == {"cpu"}
    library.use_isa("none")
    try:
        assert (library.isa(), (library.missing() is None)) == ("none", False)
        assert "turned off by use_isa('none'): name an instruction set" in str(library.missing())
        with ran() as found:
            layer(x)
        assert found == {"aten"}
        with normwise.backend("cpu"), pytest.raises(normwise.BackendError, match="turned off by use_isa"):
            layer(x)
    finally:
        library.use_isa(before)
    assert (library.isa(), (library.missing() is None)) == (before, True)


@needs_library
@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="reads /proc")
def test_one_openmp_runtime_in_the_process() -> None:
    """Two runtimes would be two pools of threads that fight for the cores."""
    library.isa()
    with open("/proc/self/maps") as maps:
        runtimes = {line.split()[-1] for line in maps if "libgomp" in line or "libiomp" in line or "libomp" in line}
    assert len(runtimes) == 1, runtimes


@needs_library
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_thread_count_is_the_callers(threads: int) -> None:
    assert library.threads_used(threads) == threads


@needs_library
def test_denormals_survive_loading() -> None:
    """A library linked with -ffast-math would make the whole process flush them to zero."""
    library.isa()
    assert float(torch.tensor(1e-40) * 0.5) > 0
    assert ctypes.c_double(5e-324).value > 0


@needs_library
def test_results_do_not_depend_on_threads() -> None:
    x, dy = torch.randn(2, 40, 48, 41), torch.randn(2, 40, 48, 41)
    weight, bias = torch.randn(2, 40)

    def everything() -> list[torch.Tensor]:
        found: list[torch.Tensor] = []
        for layout in (x, x.to(memory_format=torch.channels_last), x[:, :3].contiguous()):
            c = layout.shape[1]
            grad = dy[:, :c].contiguous() if layout.is_contiguous() else dy.to(memory_format=torch.channels_last)
            y, stats, _ = channels_forward(layout, None, None, weight[:c], bias[:c], True, 0.1, 1e-5)
            found += [y, stats, *channels_backward(grad, layout, stats, weight[:c], bias[:c], True)[:3]]
        y, stats = groups_forward(x, 4, weight, bias, 1e-5)
        found += [y, stats, *groups_backward(dy, x, stats, 4, weight, bias)[:3]]
        flat, flat_dy = x.view(-1, 41), dy.view(-1, 41)
        by_rows = rows_forward(flat, 41, None, None, 1e-5)
        found += [by_rows.y, *rows_backward(flat_dy, flat, by_rows.stats, 41, torch.ones(41), torch.zeros(41))[:3]]
        return found

    torch.set_num_threads(1)
    alone = everything()
    for threads in (2, 3, 4):
        torch.set_num_threads(threads)
        for one, many in zip(alone, everything(), strict=True):
            assert torch.equal(one, many)


@needs_library
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_after_fork_with_one_thread() -> None:
    """As torch: a forked child, such as a DataLoader's worker, may go on with one thread."""
    told = python(
        "import os, torch; from support.kernel_calls import rows_forward; x = torch.randn(512, 512)\n"
        "rows_forward(x, 512, None, None, 1e-5)\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    torch.set_num_threads(1); rows_forward(x, 512, None, None, 1e-5); os._exit(7)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))",
        PYTHONWARNINGS="ignore",
    )
    assert told == "7"


@needs_library
def test_a_thousand_calls_leave_memory_flat() -> None:
    told = python(
        "import resource, torch; torch.set_num_threads(1)\n"
        "from support.kernel_calls import *\n"
        "x, w = torch.randn(8, 16, 300), torch.ones(16)\n"
        "mask, half = torch.rand(8, 300) < 0.5, x.bfloat16()\n"
        "every = [t for x in (x, half) for t in (x, x.movedim(1, -1).contiguous().movedim(-1, 1))]\n"
        "def step():\n"
        "  for x in every:\n"
        "    more = {'act': 'relu', 'residual': x, 'mask': mask}\n"
        "    y, stats, _ = channels_forward(x, None, None, w, w, True, 0.1, 1e-5, **more)\n"
        "    channels_backward(y, x, stats, w, w, True, **more)\n"
        "    y, stats = groups_forward(x, 4, w, w, 1e-5, **more); groups_backward(y, x, stats, 4, w, w, **more)\n"
        "  for x in x, half:\n"
        "    x = x.reshape(-1, 300); r = rows_forward(x, 300, None, None, 1e-5, residual=x)\n"
        "    rows_backward(r.y, r.sum, r.stats, 300, None, None)\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "[step() for _ in range(100)]; before = peak(); [step() for _ in range(1000)]; print(peak() - before)"
    )
    assert int(told) < 2048, f"{told} KiB more"


@pytest.mark.parametrize("level", LEVELS_FOR_NORMS)
def test_rows_near_zero(level: str) -> None:
    with instruction_sets.on(level):
        for rows, cols in ((3, 7), (5, 64), (2, 1000)):
            x = torch.linspace(-1, 1, cols).repeat(rows, 1)
            assert library.rows_near_zero(x, cols, 1e-5, 32)
            deviation = (x[0].var(correction=0) + 1e-5).sqrt()
            assert library.rows_near_zero(x + 31.9 * deviation, cols, 1e-5, 32)
            for last in (32.1 * deviation, -32.1 * deviation, torch.inf, torch.nan, 1e30):
                far = x.clone()
                far[-1] += last
                assert not library.rows_near_zero(far, cols, 1e-5, 32)
