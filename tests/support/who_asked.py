"""Which tests asked whether the library of C++ kernels is there: what a test that never asked does cannot depend on it.

`make test-all-kernels` writes the names of those that passed and never asked, and `make test-without-kernels` leaves
them out. A test counts as one that asked as well if it started a process, which may ask, or called torch.compile, which
keeps code of tests before it; so do all tests of a file that asked while it was imported, or in a fixture of
all its tests.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from normwise.backends.cpu import library

ROOT = Path(__file__).parents[2]
ASKED = "asked for the library"
# What Python's audit hooks hear of a process that is started: the last is how one is asked of multiprocessing's server.
STARTS_A_PROCESS = {"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.exec", "socket.connect"}


def state_of_the_code() -> str:
    """Of all that the names were noted with: the code, the tests, the library and torch."""
    digest = hashlib.sha256(torch.__version__.encode())
    files = [path for folder in ("src", "tests", "benchmarks", "examples") for path in (ROOT / folder).rglob("*.py")]
    for path in sorted([*files, *(ROOT / "src").rglob(library.NAME)]):
        digest.update(f"{path.relative_to(ROOT)} {path.stat().st_size}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def noted(file: Path) -> set[str]:
    """Names of the tests that never asked; none if the file is not there or anything has changed since."""
    try:
        found = json.loads(file.read_text())
    except FileNotFoundError:
        return set()
    return set(found["never"]) if found["code"] == state_of_the_code() else set()


class Note:
    """A plugin that notes in `file` which tests passed and never asked. Without a library there is nothing to note."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.asked = False
        self.files_that_asked: set[Path] = set()
        self.never: set[str] = set()
        self.others: set[str] = set()
        self.patches: list[Any] = []

    def pytest_sessionstart(self) -> None:
        self.file.unlink(missing_ok=True)
        for owner, name in ((library, "load"), (library, "turned_off"), (torch, "compile")):
            patch = mock.patch.object(owner, name, self._heard(getattr(owner, name)))
            patch.start()
            self.patches.append(patch)
        sys.addaudithook(self._audit)  # which stays as long as the process

    def _heard(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.asked = True
            return function(*args, **kwargs)

        call.__dict__.update(vars(function))  # such as what a cache holds: `__wrapped__`
        return call

    def _audit(self, event: str, _: Any) -> None:
        if event in STARTS_A_PROCESS:
            self.asked = True

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(self, collector: pytest.Collector) -> Generator[None, Any, Any]:
        self.asked = False
        report = yield
        if self.asked:
            self.files_that_asked.add(collector.path)
        return report

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any, request: pytest.FixtureRequest) -> Generator[None, Any, Any]:
        """What it asks for a whole file (or more) goes for every test of that file."""
        before, self.asked = self.asked, False
        try:
            return (yield)
        finally:
            if self.asked and fixturedef.scope != "function":
                self.files_that_asked.add(request.node.path)
            self.asked = self.asked or before

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, Any, Any]:
        self.asked = item.path in self.files_that_asked
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
        report = yield
        if call.when == "teardown":
            report.user_properties.append((ASKED, self.asked))
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """In the process that starts the workers, of all of them."""
        if report.outcome != "passed" or (ASKED, True) in report.user_properties:
            self.others.add(report.nodeid)
        elif report.when == "teardown":
            self.never.add(report.nodeid)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        while self.patches:
            self.patches.pop().stop()
        if not hasattr(session.config, "workerinput") and library.missing() is None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            names = sorted(self.never - self.others)
            self.file.write_text(json.dumps({"code": state_of_the_code(), "never": names}, indent=0))
