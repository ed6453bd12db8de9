"""Every kernel test runs on each instruction set that this machine has, with fresh memory full of NaN."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from normwise.backends.cpu import library
from support.instruction_sets import LEVELS, LEVELS_FOR_NORMS, on


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without the library there is nothing to test here, except that its absence is told."""
    why_not = library.missing()
    if why_not is None:
        return
    for item in items:
        if "kernels" in item.path.parts and item.path.name != "test_library.py":
            item.add_marker(pytest.mark.skip(reason=why_not))


@pytest.fixture(params=LEVELS_FOR_NORMS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once on each instruction set that all kernels are compiled for."""
    with on(request.param):
        yield request.param


@pytest.fixture(params=LEVELS)
def isa_with_tiles(request: pytest.FixtureRequest) -> Iterator[str]:
    """The same for tests of matrix products, which are others in tile registers."""
    with on(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def fresh_memory_of_nan(poisoned_memory: None) -> None:
    """For every test here."""
