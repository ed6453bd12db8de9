"""Finds and loads the compiled library (csrc/), once, when it is first asked for.

The library must come after torch into the process: the OpenMP runtime that it asks for is then the one that torch has
loaded, both share one pool of threads, and `torch.set_num_threads` rules both.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch  # noqa: F401  # before the library, see above

ABI = 5
NAME = {"Darwin": "libnormwise.dylib"}.get(platform.system(), "libnormwise.so")
STATS_NOT_UPDATED = 3  # NW_STATS_NOT_UPDATED
ISA_LEVELS = ("avx512_amx", "avx512", "avx2", "baseline")
OFF = "none"  # in place of a level: no kernels, as on a machine where they were not built
CURE = "install a C++ compiler (g++ or clang++) and reinstall normwise with pip install --force-reinstall --no-deps"


class Loaded(NamedTuple):
    """The library, or why there is none."""

    library: ctypes.CDLL | None
    why_not: str | None


@cache
def load() -> Loaded:
    """The loaded library. NORMWISE_ISA, one of ISA_LEVELS, forces an instruction set, and never falls back; OFF leaves
    the library alone."""
    wanted = os.environ.get("NORMWISE_ISA")
    if wanted == OFF:
        return Loaded(None, f"NORMWISE_ISA={OFF} turns the C++ kernels off: unset it to have them")
    path = _find()
    if path is None:
        return Loaded(None, f"normwise was installed without its compiled library {NAME}; to get it, {CURE}")
    try:
        handle = ctypes.CDLL(str(path))
    except OSError as error:
        return Loaded(None, f"the compiled library {path} does not load here ({error}); to rebuild it, {CURE}")
    handle.nw_isa.restype = ctypes.c_char_p
    handle.nw_use_isa.argtypes = [ctypes.c_char_p]
    handle.nw_struct_size.restype = ctypes.c_int64
    found = handle.nw_abi()
    if found != ABI:
        return Loaded(None, f"{path} was built for another version of normwise (ABI {found}, not {ABI}): reinstall it")
    handle.nw_count_valid.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
    handle.nw_count_valid.restype = ctypes.c_int64
    handle.nw_mean_exceeds.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_double]
    if wanted and handle.nw_use_isa(wanted.encode()) != 0:
        usable = [level for level in ISA_LEVELS if handle.nw_use_isa(level.encode()) == 0]
        return Loaded(
            None,
            f"NORMWISE_ISA={wanted} cannot run here: set it to one of {', '.join(usable)}, to {OFF} for no kernels at "
            "all, or unset it",
        )
    return Loaded(handle, None)


def fault(status: int) -> Exception:
    """What a kernel that returned `status`, other than NW_OK, has to say; it has written nothing."""
    if status == 2:
        return MemoryError("no memory for a kernel's scratch space")
    return ValueError("a kernel refused its arguments")


def library() -> ctypes.CDLL:
    """The loaded library. RuntimeError with the reason if there is none."""
    handle, why = load()
    if handle is None:
        raise RuntimeError(f"the C++ kernels are not available: {why}")
    return handle


def kernel(name: str) -> Callable[[bytes], bool]:
    """The C function `name`, which takes its packed argument struct; looked up at the first call.

    It returns True, or False where all was done except moving running averages to what is not finite.
    """
    function = None

    def call(arguments: bytes) -> bool:
        nonlocal function
        if function is None:
            found = getattr(library(), name)
            found.argtypes, found.restype = [ctypes.c_char_p], ctypes.c_int
            function = found
        status = function(arguments)
        if status and status != STATS_NOT_UPDATED:
            raise fault(status)
        return not status

    return call


def _find() -> Path | None:
    """Beside this file, where both kinds of install put it."""
    path = Path(__file__).parent / NAME
    return path if path.is_file() else None
