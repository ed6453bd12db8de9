"""The self-test passes here, and fails where a kernel computes nothing, or something else."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from normwise import selftest
from normwise.backends.cpu import library
from normwise.ops import dispatch
from support.backends import without_kernels
from support.instruction_sets import USABLE

needs_library = pytest.mark.skipif(library.missing() is not None, reason=str(library.missing()))


@pytest.fixture
def few_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "NORMS", selftest.NORMS[:2])
    monkeypatch.setattr(selftest, "RECURRENT", selftest.RECURRENT[:1])


@needs_library
def test_all_of_it_passes_and_names_every_instruction_set() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "normwise.selftest", "--need-kernels"], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for level in library.ISA_LEVELS:
        assert f"{'ok' if level in USABLE else 'absent':<7} kernels, {level}" in done.stdout
    for what in ("layers", "layers beside torch.nn's", "normwise info", "normwise explain"):
        assert f"ok      {what}" in done.stdout
    assert "FAILED" not in done.stdout
    assert "all that is here works" in done.stdout


@needs_library
@pytest.mark.usefixtures("few_cases", "poisoned_memory")
def test_a_kernel_that_computes_nothing_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(library.functions, "nw_rows_forward", lambda arguments: 0)
    report = selftest.Report()
    selftest.try_kernels(report, needed=True)
    assert report.failed
    assert "LayerNorm in float32 is off by inf" in capsys.readouterr().out


@needs_library
@pytest.mark.usefixtures("few_cases")
def test_an_error_of_a_thousandth_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    right = selftest.results

    def wrong(*arguments: object) -> list[torch.Tensor]:
        found = right(*arguments)  # type: ignore[arg-type]
        return found if dispatch.forced() == "reference" else [found[0] * 1.001, *found[1:]]

    monkeypatch.setattr(selftest, "results", wrong)
    report = selftest.Report()
    selftest.try_layers(report)
    assert report.failed
    assert "FAILED  layers " in capsys.readouterr().out


@pytest.mark.usefixtures("few_cases")
@pytest.mark.parametrize("needed", [False, True])
def test_missing_kernels_fail_only_where_they_are_needed(needed: bool, capsys: pytest.CaptureFixture) -> None:
    report = selftest.Report()
    with without_kernels():
        selftest.try_kernels(report, needed)
    assert report.failed == needed
    assert ("FAILED  kernels" if needed else "absent  kernels") in capsys.readouterr().out


@pytest.mark.usefixtures("few_cases")
def test_a_lacking_package_of_the_command_line_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(selftest, "find_spec", lambda name: None if name == "rich" else object())
    report = selftest.Report()
    selftest.try_command_line(report)
    assert not report.failed
    assert "needs rich: pip install 'normwise[lab]'" in capsys.readouterr().out


def test_two_openmp_runtimes_in_the_process_fail(capsys: pytest.CaptureFixture) -> None:
    maps = [
        "7f00-7f01 r-xp 00000000 08:01 1 /venv/torch/lib/libgomp.so.1",
        "7f01-7f02 r--p 00000000 08:01 1 /venv/torch/lib/libgomp.so.1",
        "7f02-7f03 r-xp 00000000 08:01 2 /venv/normwise.libs/libgomp-a34b.so.1.0.0",
    ]
    report = selftest.Report()
    selftest.try_threads(report, maps[:2])
    assert not report.failed
    selftest.try_threads(report, maps)
    assert report.failed
    assert "two OpenMP runtimes" in capsys.readouterr().out
