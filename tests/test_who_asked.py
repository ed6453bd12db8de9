"""Only tests that cannot depend on the library are left out where it is turned off."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from normwise.backends.cpu import library
from support import who_asked

pytestmark = pytest.mark.skipif(library.missing() is not None, reason=str(library.missing()))

TESTS = """
import os
import subprocess
import sys

import pytest
import torch

import normwise

x = torch.randn(4, 8)


@pytest.fixture(scope="module")
def y():
    return torch.nn.LayerNorm(8)(x)


def test_never(y):
    assert y.shape == x.shape


def test_error():
    with pytest.raises(TypeError):
        normwise.LayerNorm(0.5)


def test_asks():
    normwise.LayerNorm(8)(x)


def test_compiles():
    torch.compile(torch.nn.ReLU(), backend="eager")


def test_starts_a_process():
    subprocess.run(["true"])


def test_forks():
    if os.fork() == 0:
        os._exit(0)
    os.wait()


def test_fails():
    assert False


def test_is_skipped():
    pytest.skip()
"""
ASKS_FOR_ALL = """
import pytest
import torch

import normwise

@pytest.fixture(scope="module")
def y():
    return normwise.LayerNorm(8)(torch.randn(4, 8))


def test_with_it(y):
    pass


def test_again(y):
    pass
"""
ASKS_AT_IMPORT = """
import torch

import normwise

y = normwise.LayerNorm(8)(torch.randn(4, 8))


def test_of_it():
    pass
"""


@pytest.mark.parametrize("workers", ["0", "1"])
def test_those_are_noted_that_passed_and_never_asked(tmp_path: Path, workers: str) -> None:
    tests = who_asked.ROOT / "tests"
    (tmp_path / "conftest.py").write_text((tests / "conftest.py").read_text())
    (tmp_path / "pytest.ini").write_text(f"[pytest]\npythonpath = {tests}\n")
    for name, text in {"some": TESTS, "fixture": ASKS_FOR_ALL, "import": ASKS_AT_IMPORT}.items():
        (tmp_path / f"test_{name}.py").write_text(text)
    file = tmp_path / "asked" / "never.json"
    options = ["-p", "no:cacheprovider", "-n", workers, "--note-never-asked", file]
    environment = {name: value for name, value in os.environ.items() if "PYTEST" not in name}
    command = [sys.executable, "-m", "pytest", *options, tmp_path]
    told = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200).stdout
    assert "1 failed, 9 passed, 1 skipped" in told, told
    assert who_asked.noted(file) == {"test_some.py::test_never", "test_some.py::test_error"}


def test_nothing_is_left_out_once_anything_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "never.json"
    assert who_asked.noted(file) == set()
    file.write_text(f'{{"code": "{who_asked.state_of_the_code()}", "never": ["a"]}}')
    assert who_asked.noted(file) == {"a"}
    for folder in ("src", "tests"):
        (tmp_path / folder).mkdir()
    monkeypatch.setattr(who_asked, "ROOT", tmp_path)
    assert who_asked.noted(file) == set()
    before = who_asked.state_of_the_code()
    for path in ("src/a.py", f"src/{library.NAME}", "tests/test_a.py"):
        (tmp_path / path).write_text("1")
        assert who_asked.state_of_the_code() != before
        before = who_asked.state_of_the_code()


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("target", ["test-all-kernels", "test-without-kernels"])
def test_make_tests_a_second_time(tmp_path: Path, target: str) -> None:
    """The file of the first time is there then, and pytest must not take it for a place where tests are."""
    file = tmp_path / "never.json"
    file.write_text("{}")
    make = ["make", "--dry-run", "--no-print-directory", target, f"NEVER_ASKED={file}"]
    told = subprocess.run(make, cwd=who_asked.ROOT, capture_output=True, text=True, check=True).stdout
    (command,) = [line for line in told.replace("\\\n", " ").splitlines() if " -m pytest " in line]
    assert str(file) in command
    options = shlex.split(command.partition(" -m pytest ")[2])
    environment = {name: value for name, value in os.environ.items() if "PYTEST" not in name}
    asked = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "--help"],
        cwd=who_asked.ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert asked.returncode == 0, asked.stderr
    assert "--note-never-asked" in asked.stdout, "pytest did not read conftest.py, whose options these are"
