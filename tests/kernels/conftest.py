"""Every kernel test runs on each instruction set that this machine has, with fresh memory full of NaN."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from normwise.backends.cpu import cpu
from normwise.backends.cpu.library import ISA_LEVELS


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without the library there is nothing to test here, except that its absence is told."""
    why_not = cpu.why_not()
    if why_not is None:
        return
    for item in items:
        if "kernels" in item.path.parts and item.path.name != "test_library.py":
            item.add_marker(pytest.mark.skip(reason=why_not))


def usable_levels() -> list[str]:
    """The instruction sets that run here, best first."""
    if not cpu.available():
        return ["none"]
    before, usable = cpu.isa(), []
    for level in ISA_LEVELS:
        try:
            cpu.use_isa(level)
        except ValueError:
            continue
        usable.append(level)
    cpu.use_isa(before)
    return usable


@pytest.fixture(params=[level for level in usable_levels() if level != "avx512_amx"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once on each instruction set that all kernels are compiled for."""
    yield from on(request.param)


@pytest.fixture(params=usable_levels())
def isa_with_tiles(request: pytest.FixtureRequest) -> Iterator[str]:
    """The same for tests of matrix products, which are others in tile registers."""
    yield from on(request.param)


def on(level: str) -> Iterator[str]:
    before = cpu.isa()
    cpu.use_isa(level)
    yield level
    cpu.use_isa(before)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.empty` and `torch.empty_like` return NaN everywhere: an element that a kernel forgets shows."""
    empty, empty_like = torch.empty, torch.empty_like

    def poisoned(t: Tensor) -> Tensor:
        return t.fill_(float("nan")) if t.is_floating_point() else t

    def poisoned_empty(*args: Any, **kwargs: Any) -> Tensor:
        return poisoned(empty(*args, **kwargs))

    def poisoned_empty_like(*args: Any, **kwargs: Any) -> Tensor:
        return poisoned(empty_like(*args, **kwargs))

    monkeypatch.setattr(torch, "empty", poisoned_empty)
    monkeypatch.setattr(torch, "empty_like", poisoned_empty_like)
