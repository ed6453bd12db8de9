"""The instruction sets of the compiled kernels: which ones run here, and running something on one of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from normwise.backends.cpu import library
from normwise.backends.cpu.library import ISA_LEVELS


def _runs_here(level: str) -> bool:
    try:
        with on(level):
            return True
    except ValueError:
        return False


@contextmanager
def on(level: str) -> Iterator[None]:
    """The kernels of that instruction set; ValueError where it does not run."""
    before = library.isa()
    library.use_isa(level)
    try:
        yield
    finally:
        library.use_isa(before)


# Best first; none where there are no kernels.
USABLE = [level for level in ISA_LEVELS if library.missing() is None and _runs_here(level)]
# "avx512_amx" is "avx512" but for matrix products.
USABLE_FOR_NORMS = [level for level in USABLE if level != "avx512_amx"]

# For the parameters of a fixture: those that the processor or the build lacks are skipped, and say so.
LEVELS = [
    level if level in USABLE else pytest.param(level, marks=pytest.mark.skip(reason=f"{level} does not run here"))
    for level in ISA_LEVELS
]
LEVELS_FOR_NORMS = LEVELS[1:]
