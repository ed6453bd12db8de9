"""Fixtures that every test shares: each test starts from its own seed and leaves torch as it found it."""

from __future__ import annotations

import os
import random
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from torch import Tensor

from normwise.backends.cpu import norms
from support.browser import browser, open_page  # noqa: F401 (fixtures)
from support.devices import devices
from support.who_asked import Note, noted

# Examples come from a fixed seed, so that a red run is red again on the next machine; the first call of an op
# may compile or load a library, so a deadline per example would fail by chance.
hypothesis.settings.register_profile("normwise", derandomize=True, deadline=None, print_blob=True)
hypothesis.settings.load_profile("normwise")


# Of the workers and all other processes that are started from here on. A thread that waits for its next parallel region
# spins by default, on a core that another process could use: half the processor's time of tests of several threads.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

if "PYTEST_XDIST_WORKER" in os.environ:
    # One worker a core already: two threads each would make them wait for one another at every barrier.
    torch.set_num_threads(1)


# The values of a parameter "backend" with which a test runs the same code where there is no library as where there is
# one, or is skipped there. (One thing differs, by whom a mask is counted, and "no kernels" tests that where there is.)
INDIFFERENT_TO_THE_LIBRARY = {"kernels", "no kernels", "aten", "reference"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--where-the-library-counts",
        action="store_true",
        help='leave out tests with a parameter "backend" that names another one than the best here, and those of '
        "--never-asked",
    )
    parser.addoption(
        "--note-never-asked",
        metavar="FILE",
        help="write the names of tests that passed and did not ask whether the library is there",
    )
    parser.addoption("--never-asked", metavar="FILE", help="what --note-never-asked wrote")


def pytest_configure(config: pytest.Config) -> None:
    file = config.getoption("--note-never-asked")
    if file is not None:
        config.pluginmanager.register(Note(Path(file)))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--where-the-library-counts"):
        return
    file = config.getoption("--never-asked")
    never_asked = set() if file is None else noted(Path(file))
    left_out = {
        item: item.nodeid in never_asked
        or (
            isinstance(item, pytest.Function)
            and hasattr(item, "callspec")
            and item.callspec.params.get("backend") in INDIFFERENT_TO_THE_LIBRARY
        )
        for item in items
    }
    config.hook.pytest_deselected(items=[item for item in items if left_out[item]])
    items[:] = [item for item in items if not left_out[item]]


@pytest.fixture(autouse=True)
def seeded_and_restored(request: pytest.FixtureRequest) -> Iterator[None]:
    """Seed from the test's own name, so that order and xdist's split do not matter; undo global settings."""
    seed = zlib.crc32(request.node.nodeid.encode())
    random.seed(seed)
    torch.manual_seed(seed)
    threads, dtype, grad = torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()
    path = sys.path.copy()  # the folder of a user's file stays there
    deterministic = torch.are_deterministic_algorithms_enabled()
    yield
    sys.path[:] = path
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    torch.set_grad_enabled(grad)
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture(params=devices())
def device(request: pytest.FixtureRequest) -> torch.device:
    """Runs the test once on each device of the machine."""
    return torch.device(request.param)


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """All fresh memory holds NaN: an element that a kernel forgets shows.

    That is what `empty`, `empty_like` and `new_empty` of torch give.
    """

    def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            t = make(*args, **kwargs)
            return t.fill_(float("nan")) if t.is_floating_point() else t

        return call

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
    for name in ("_empty_like", "_empty"):  # which it holds at hand
        monkeypatch.setattr(norms, name, getattr(torch, name[1:]))
