"""Finds and loads the compiled library (csrc/), once, when it is first asked for.

The library must come after torch into the process: the OpenMP runtime that it asks for is then the one that torch has
loaded, both share one pool of threads, and `torch.set_num_threads` rules both.
"""

import ctypes
import os
import platform
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple, NoReturn

from torch import Tensor  # torch must be loaded before the library, see above

ABI = 10
NAME = {"Darwin": "libnormwise.dylib"}.get(platform.system(), "libnormwise.so")
STATS_NOT_UPDATED = 3  # NW_STATS_NOT_UPDATED: all was done but updating running averages
ISA_LEVELS = ("avx512_amx", "avx512", "avx2", "baseline")
OFF = "none"  # in place of a level: no kernels, as on a machine where they were not built
CURE = "install a C++ compiler (g++ or clang++) and reinstall normwise with pip install --force-reinstall --no-deps"

NOT_ON_WINDOWS = (
    "the C++ kernels are not built on Windows, where Microsoft's compiler lacks the vector extensions that they are "
    "written in (clang-cl has them, but nobody has tried it); everything else works, through torch"
)


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
    if path is None and platform.system() == "Windows":
        return Loaded(None, NOT_ON_WINDOWS)
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
    if handle.nw_isa() is None:
        return Loaded(
            None, f"{path} was built for another processor alone, as `make compare` does; to rebuild it, {CURE}"
        )
    handle.nw_count_valid.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
    handle.nw_count_valid.restype = ctypes.c_int64
    handle.nw_rows_near_zero.argtypes = [ctypes.c_void_p, *[ctypes.c_int64] * 2, *[ctypes.c_double] * 2]
    if wanted and handle.nw_use_isa(wanted.encode()) != 0:
        usable = [level for level in ISA_LEVELS if handle.nw_use_isa(level.encode()) == 0]
        return Loaded(
            None,
            f"NORMWISE_ISA={wanted} cannot run here: set it to one of {', '.join(usable)}, to {OFF} for no kernels at "
            "all, or unset it",
        )
    return Loaded(handle, None)


class _Switch:
    off: str | None = None  # why the kernels are off although the library is there


_switch = _Switch()


def missing() -> str | None:
    """What keeps the library from being used, with the cure; None if nothing does."""
    return _switch.off or load().why_not


def turned_off() -> bool:
    """Whether the kernels are turned off by NORMWISE_ISA=none or `use_isa("none")`."""
    return _switch.off is not None or os.environ.get("NORMWISE_ISA") == OFF


def library() -> ctypes.CDLL:
    """The loaded library. RuntimeError with the reason if there is none."""
    handle, why = load()
    if handle is None:
        raise RuntimeError(f"the C++ kernels are not available: {why}")
    return handle


class _Functions:
    """The functions of the library that take a packed argument struct and return an `nw_status`, by name."""

    def __getattr__(self, name: str) -> Callable[[bytes], int]:
        function = getattr(library(), name)
        function.argtypes, function.restype = [ctypes.c_char_p], ctypes.c_int
        setattr(self, name, function)  # found at once from now on
        return function  # type: ignore[no-any-return]


functions = _Functions()


def raise_fault(status: int) -> NoReturn:
    """What a kernel that returned `status`, other than NW_OK, has to say; it has written nothing."""
    if status == 2:
        raise MemoryError("no memory for a kernel's scratch space")
    raise ValueError("a kernel refused its arguments")


def isa() -> str:
    """The instruction set in use, one of ISA_LEVELS, or "none" where the kernels are turned off; "avx512_amx"
    multiplies matrices in tile registers."""
    return OFF if turned_off() else str(library().nw_isa().decode())


def use_isa(name: str) -> None:
    """Switch the whole process to another instruction set; "none" turns the kernels off until another one is named.
    ValueError if the processor or the build lacks it, RuntimeError if there is no library."""
    if name == OFF:
        _switch.off = f"the C++ kernels are turned off by use_isa({OFF!r}): name an instruction set to have them again"
    elif name not in ISA_LEVELS or library().nw_use_isa(name.encode()) != 0:
        raise ValueError(
            f"instruction set {name!r} cannot run here: expected one of {', '.join(ISA_LEVELS)}, or {OFF} for no "
            "kernels"
        )
    else:
        _switch.off = None


def threads_used(threads: int) -> int:
    """How many threads a parallel region of the library gets when it asks for `threads`."""
    return int(library().nw_threads(threads))


def count_valid(mask: Tensor, enough: int) -> int:
    """How many elements of a bool mask, `readable` and contiguous, are True; no more than `enough` are looked for."""
    return int(library().nw_count_valid(mask.data_ptr(), mask.numel(), enough))


def rows_near_zero(x: Tensor, cols: int, eps: float, limit: float) -> bool:
    """Whether |mean| <= limit * sqrt(var + eps) in every run of `cols` neighbours in `x`, contiguous, `readable`
    and of float32."""
    return bool(library().nw_rows_near_zero(x.data_ptr(), x.numel() // cols, cols, eps, limit))


def _find() -> Path | None:
    """Beside this file, where both kinds of install put it."""
    path = Path(__file__).parent / NAME
    return path if path.is_file() else None
