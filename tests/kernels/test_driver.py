"""The C++ test driver under AddressSanitizer and UBSan: no access past an end, nothing undefined."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from normwise.backends.cpu import library

ROOT = Path(__file__).parents[2]


def run(*command: str, **environment: str) -> str:
    """Standard output and error of a command that must succeed."""
    done = subprocess.run(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


@pytest.mark.timeout(600)
def test_driver_is_clean_under_sanitizers(tmp_path: Path) -> None:
    cmake = shutil.which("cmake")
    if cmake is None or not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("the driver is built here: that needs cmake and a C++ compiler")
    level = library.isa()
    compiled = level.removesuffix("_amx")  # whose kernels run without tiles, too
    configure = [cmake, "-S", str(ROOT), "-B", str(tmp_path), "-DNORMWISE_TEST_DRIVER=ON", "-DNORMWISE_SUBSET=ON"]
    run(*configure, f"-DNORMWISE_LEVELS={compiled}")
    run(cmake, "--build", str(tmp_path), "--parallel", "2")
    # OpenMP's own threads outlive main, which is no leak of ours.
    told = run(str(tmp_path / "normwise_driver"), OMP_NUM_THREADS="3", ASAN_OPTIONS="detect_leaks=1")
    assert f"{level}: ok" in told
    assert f"{compiled}: ok" in told
    assert "baseline: ok" in told
