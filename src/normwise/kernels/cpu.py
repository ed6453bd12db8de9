"""The compiled CPU kernels as a whole: whether they can be used, with which instruction set, and for what."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

from torch import Tensor

from normwise.kernels.arguments import DTYPES, unreadable
from normwise.kernels.library import ISA_LEVELS, OFF, library, load


class _Switch:
    off: str | None = None  # why the kernels are off although the library is there


_switch = _Switch()


@cache
def available() -> bool:
    """Whether the compiled kernels can be used in this process, for now."""
    return why_not() is None


def why_not() -> str | None:
    """What keeps the compiled kernels from being used, with the cure; None if nothing does."""
    return _switch.off or load().why_not


def turned_off() -> bool:
    """Whether the kernels are not used because somebody said so, by NORMWISE_ISA=none or `use_isa("none")`."""
    return _switch.off is not None or os.environ.get("NORMWISE_ISA") == OFF


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
    available.cache_clear()


def threads_used(threads: int) -> int:
    """How many threads a parallel region of the library gets when it asks for `threads`."""
    return int(library().nw_threads(threads))


def obstacle(x: Tensor) -> str | None:
    """Why the kernels cannot take the input `x`, or None if they can."""
    if x.device.type != "cpu":
        return f"the C++ kernels run on the CPU, not on {x.device}"
    if x.dtype not in DTYPES:
        return f"the C++ kernels take float32, bfloat16 and float64, not {x.dtype}"
    return unreadable(x) or why_not()


def count_valid(mask: Tensor, enough: int) -> int:
    """How many elements of a bool mask, `readable` and contiguous, are True; no more than `enough` are looked for."""
    return int(library().nw_count_valid(mask.data_ptr(), mask.numel(), enough))


def mean_exceeds(mean: Tensor, rstd: Tensor, limit: float) -> bool:
    """Whether any |mean * rstd| is above `limit`; both float32, `readable` and contiguous."""
    return _mean_exceeds()(mean.data_ptr(), rstd.data_ptr(), mean.numel(), limit) != 0  # type: ignore[no-any-return]


@cache
def _mean_exceeds() -> Any:
    return library().nw_mean_exceeds
