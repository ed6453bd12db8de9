"""What is released: settings that agree with one another, and a check of wheels that sees what is wrong with one."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from scripts import check_wheel

ROOT = Path(__file__).parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
PLATFORMS = {
    "linux": ["manylinux_x86_64", "manylinux_aarch64"],
    "macos": ["macosx_arm64"],
    "windows": ["win_amd64"],
}


def workflow(name: str) -> dict[str, Any]:
    yaml = pytest.importorskip("yaml")
    return dict(yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text(encoding="utf-8")))


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.skipif(find_spec("cibuildwheel") is None, reason="cibuildwheel is not installed (it needs Python 3.11)")
def test_cibuildwheel_builds_one_wheel_for_each_platform(platform: str) -> None:
    command = [sys.executable, "-m", "cibuildwheel", "--print-build-identifiers", "--platform", platform, str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [f"cp311-{wheel}" for wheel in PLATFORMS[platform]]


def test_the_workflow_builds_and_tries_every_platform_on_every_python_and_torch() -> None:
    jobs = workflow("wheels.yml")["jobs"]
    built = jobs["build"]["strategy"]["matrix"]["include"]
    assert [entry["wheel"] for entry in built] == [wheel for wheels in PLATFORMS.values() for wheel in wheels]
    tried = jobs["try"]["strategy"]["matrix"]
    assert tried["platform"] == built
    assert tried["python"][0] == re.search(r'requires-python = ">=(.+)"', PROJECT)[1]  # type: ignore[index]
    assert tried["python"] == [f"3.{minor}" for minor in range(10, 15)]
    oldest = re.search(r'dependencies = \["torch>=(.+)"\]', PROJECT)[1]  # type: ignore[index]
    assert tried["torch"] == [f"torch=={oldest}.*", "torch"]
    assert jobs["publish"]["needs"] == "try"


def test_the_workflow_of_tests_runs_what_runs_before_a_change_lands() -> None:
    assert workflow("test.yml")["jobs"]["everything"]["steps"][-1]["run"].endswith(".ci/run")


GOOD = [
    "normwise/__init__.py",
    "normwise/py.typed",
    "normwise/lab/templates/report.css",
    "normwise/lab/data/README.md",
    "normwise/diagnosis/page/page.css",
    "normwise/backends/cpu/libnormwise.so",
]


def made_up_wheel(folder: Path, *names: str, tag: str = "py3-none-manylinux_2_28_x86_64") -> Path:
    wheel = folder / f"normwise-0.1.0-{tag}.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in names:
            archive.writestr(name, "")
    return wheel


def test_a_good_wheel_has_no_faults(tmp_path: Path) -> None:
    assert check_wheel.faults(made_up_wheel(tmp_path, *GOOD)) == []
    assert check_wheel.faults(made_up_wheel(tmp_path, *GOOD[:-1]), kernels=False) == []


@pytest.mark.parametrize(
    ("names", "tag", "told"),
    [
        ([*GOOD, "normwise.libs/libgomp-a34b3233.so.1.0.0"], "", "an OpenMP runtime beside torch's"),
        ([*GOOD, "normwise/.dylibs/libomp.dylib"], "", "an OpenMP runtime beside torch's"),
        (GOOD[:-1], "", "compiled libraries are []"),
        ([*GOOD, "normwise.libs/libstdc++-1.so.6"], "", "one in normwise/backends/cpu was expected"),
        (GOOD[1:2] + GOOD[3:], "", "it lacks normwise/lab/templates/"),
        ([*GOOD, "tests/test_release.py"], "", "it holds tests/test_release.py"),
        (GOOD, "py3-none-linux_x86_64", "auditwheel gives it a manylinux tag"),
        (GOOD, "cp311-cp311-manylinux_2_28_x86_64", "one wheel serves every Python"),
    ],
)
def test_a_fault_of_a_wheel_is_told(tmp_path: Path, names: list[str], tag: str, told: str) -> None:
    wheel = made_up_wheel(tmp_path, *names, tag=tag or "py3-none-manylinux_2_28_x86_64")
    (fault,) = check_wheel.faults(wheel)
    assert told in fault


def made_up_sdist(folder: Path, *names: str) -> Path:
    sdist = folder / "normwise-0.1.0.tar.gz"
    with tarfile.open(sdist, "w:gz") as archive:
        for name in names:
            archive.addfile(tarfile.TarInfo(f"normwise-0.1.0/{name}"))
    return sdist


def test_a_fault_of_a_source_distribution_is_told(tmp_path: Path) -> None:
    wanted = check_wheel.IN_A_SDIST
    assert all((ROOT / name).is_file() for name in wanted)
    assert check_wheel.sdist_faults(made_up_sdist(tmp_path, *wanted)) == []
    assert check_wheel.sdist_faults(made_up_sdist(tmp_path, *wanted[1:])) == [f"it lacks {wanted[0]}"]
    (fault,) = check_wheel.sdist_faults(made_up_sdist(tmp_path, *wanted, "src/normwise/backends/cpu/libnormwise.so"))
    assert "libnormwise.so, which was compiled" in fault


def test_the_example_that_a_wheel_is_tried_with_is_the_readmes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    assert "normwise.BatchNorm1d(12)" in check_wheel.readme_example()
    environment = check_wheel.without_compilers(Path("/somewhere"))
    assert environment["PATH"] == "/somewhere/bin"
    assert "PYTHONPATH" not in environment


def commands_of(target: str, folder: Path) -> str:
    """What `make` would run for a target with that virtual environment."""
    command = ["make", "--dry-run", "--no-print-directory", target, f"VENV={folder}"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout


def test_make_compare_installs_what_it_needs_alone_and_never_takes_the_rest_away(tmp_path: Path) -> None:
    fresh = commands_of("compare", tmp_path)
    assert "NORMWISE_LEVELS=native" in fresh
    assert "-e '.[lab]'" in fresh
    for target in ("test-all-kernels", "lint", "docs"):
        told = commands_of(target, tmp_path)
        assert "-e '.[dev]'" in told
        assert "NORMWISE_LEVELS" not in told
    (tmp_path / ".installed").touch()
    installed = commands_of("compare", tmp_path)
    assert "pip install" not in installed
    (tmp_path / ".installed").unlink()
    (tmp_path / ".installed-to-compare").touch()
    assert "pip install" not in commands_of("compare", tmp_path)
    assert "-e '.[dev]'" in commands_of("test-all-kernels", tmp_path)


@pytest.mark.parametrize(("kernels", "packages"), [(0, 0), (1, 0), (0, 1)])
def test_what_is_installed_side_by_side_fails_with_either(tmp_path: Path, kernels: int, packages: int) -> None:
    """`make compare` compiles in the background: neither half may fail unseen."""
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f"""#!/bin/sh
case "$*" in
  *"-e .[lab]"*) exit {kernels} ;;
  *install_extra*) exit {packages} ;;
esac
""")
    python.chmod(0o755)
    stamp = tmp_path / ".installed-to-compare"
    made = subprocess.run(["make", str(stamp), f"VENV={tmp_path}"], cwd=ROOT, capture_output=True, timeout=60)
    assert (made.returncode == 0) == stamp.exists() == (kernels == packages == 0)
