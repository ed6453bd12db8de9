"""The kernels on arm64, cross-compiled: right by the C++ driver under an emulator, and as tight as AVX2's by a count.

`make test-aarch64`; on Debian that needs g++-aarch64-linux-gnu and qemu-user.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from scripts import count_instructions

ROOT = Path(__file__).parents[2]
COMPILER = "aarch64-linux-gnu-g++"
needs_compiler = pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"needs {COMPILER}")


def run(*command: str, **environment: str) -> str:
    done = subprocess.run(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


@needs_compiler
@pytest.mark.skipif(shutil.which("qemu-aarch64") is None, reason="needs qemu-aarch64")
@pytest.mark.timeout(900)
def test_driver_passes_under_an_emulator(tmp_path: Path) -> None:
    """Without sanitizers, which the emulator cannot run: the same sources pass those on x86-64."""
    options = {"TEST_DRIVER": "ON", "SANITIZE": "OFF", "SUBSET": "ON"}
    target = {"SYSTEM_NAME": "Linux", "SYSTEM_PROCESSOR": "aarch64", "CXX_COMPILER": COMPILER}
    defined = [f"-DNORMWISE_{k}={v}" for k, v in options.items()] + [f"-DCMAKE_{k}={v}" for k, v in target.items()]
    run("cmake", "-S", str(ROOT), "-B", str(tmp_path), *defined)
    run("cmake", "--build", str(tmp_path), "--parallel", "2")
    told = run("qemu-aarch64", "-L", "/usr/aarch64-linux-gnu", str(tmp_path / "normwise_driver"), OMP_NUM_THREADS="3")
    assert "baseline: ok" in told
    assert int(told.split(" checks passed")[0].split()[-1]) > 100_000


@needs_compiler
def test_inner_loops_take_hardly_more_instructions_a_vector_than_avx2s() -> None:
    """A load there is an instruction of its own, of which AVX2 spares up to three: hence the quarter and the three."""
    counted = count_instructions.count_all()
    avx2, neon = counted["AVX2"], counted["NEON"]
    for name, (what, vectors) in count_instructions.LOOPS.items():
        assert neon[name].instructions > 4, what
        assert neon[name].instructions / vectors <= 1.25 * avx2[name].instructions / vectors + 1, what
        assert neon[name].calls == 0, f"{what}: the end of a row is copied by a call"
        assert neon[name].stack == 0, f"{what}: registers do not suffice"
    product = neon["product"]
    assert product.stack == 0
    assert product.instructions / product.multiply_adds <= avx2["product"].instructions / avx2["product"].multiply_adds


@needs_compiler
def test_the_table_of_the_page_is_what_is_counted() -> None:
    page = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    told = subprocess.run([COMPILER, "-dumpversion"], capture_output=True, text=True, check=True).stdout.strip()
    if not told.startswith("12"):
        pytest.skip(f"the page's table is GCC 12's, and this is {told}")
    assert count_instructions.table(count_instructions.count_all()) in page
