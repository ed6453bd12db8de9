"""Whether Triton's kernels can run here, and on which device."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor


# torch.compile does not trace what these two call, see ops/dispatch.py; a cached function it would trace, and warn.
def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on tensors of the CPU: for tests and for debugging.

    Triton reads the variable when it is imported; so it is read once here too.
    """
    return _interpreted()


def missing() -> str | None:
    """Why no Triton kernel can run on this machine, or None. Does not import Triton."""
    return _missing()


@cache
def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _missing() -> str | None:
    if find_spec("triton") is None:
        return "Triton is not installed: pip install 'normwise[triton]'"
    if interpreted() or torch.cuda.is_available():
        return None
    return "torch finds no GPU (TRITON_INTERPRET=1 in the environment runs the kernels on the CPU, slowly)"


def obstacle(x: Tensor) -> str | None:
    """What keeps the kernels from the device of `x`, or None."""
    if x.is_cuda or (x.is_cpu and interpreted()):
        return missing()
    return f"the Triton kernels take tensors on a GPU, not on {x.device} (TRITON_INTERPRET=1 takes those on the CPU)"


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Kernels are launched on the current device, which need not be that of `x`."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def power_of_2(n: int) -> int:
    """The smallest power of 2 that is at least `n` and 1: sizes of blocks."""
    return 1 << max(n - 1, 0).bit_length()


def blocks(n: int, size: int) -> int:
    """How many blocks of `size` cover `n`."""
    return -(-n // size)
