"""What the compiled kernels of all norms take: dtypes, layouts and small tensors as they expect them.

Inputs are float32, bfloat16 or float64; statistics are float64; gains and biases are computed with in float32 (float64
for float64 inputs) and their gradients come in that dtype. Nothing here knows of autograd.
"""

from __future__ import annotations

from array import array

import torch
from torch import Tensor

ACTS: dict[str | None, int] = {None: 0, "relu": 1, "leaky_relu": 2, "silu": 3, "gelu": 4}
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}
CHANNELS_FIRST, CHANNELS_LAST = 0, 1


_ZERO = array("d", (0.0,))


def numbers(count: int) -> array[float]:
    """Memory for so many doubles that only kernels read (`buffer_info()` says where), made in a tenth of the time that
    a tensor takes."""
    return _ZERO * count


def at(t: Tensor | None) -> int:
    """Where `t` lies in memory, 0 for none."""
    return 0 if t is None else t.data_ptr()


def wide(x: Tensor) -> torch.dtype:
    """The dtype of gains, biases and running averages beside `x`."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def vector(t: Tensor | None, dtype: torch.dtype, size: int) -> Tensor | None:
    """A gain or bias as the kernels read it: contiguous, in their dtype."""
    if t is None:
        return None
    if t.numel() != size:
        raise ValueError(f"expected a vector of {size} elements, but got one of shape {tuple(t.shape)}")
    if not t.is_cpu:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but the input is on cpu and a gain or bias on {t.device}: "
            "move the layer, e.g. layer.to(input.device)"
        )
    return t if t.dtype is dtype and t.is_contiguous() and not t.is_neg() else t.to(dtype).resolve_neg().contiguous()


def check_running(t: Tensor | None, dtype: torch.dtype, size: int) -> None:
    """ValueError for running averages that a kernel cannot update where they are."""
    if t is not None and (t.dtype != dtype or t.numel() != size or not t.is_contiguous()):
        raise ValueError(
            f"running averages are updated in place: expected {size} contiguous elements of {dtype}, but got "
            f"{tuple(t.shape)} of {t.dtype}"
        )


def like(t: Tensor, x: Tensor) -> Tensor:
    """`t` in the memory layout of `x`, which is dense."""
    if t.shape != x.shape or t.dtype != x.dtype:
        raise ValueError(
            f"expected a tensor like the input, {tuple(x.shape)} of {x.dtype}, but got {tuple(t.shape)} of {t.dtype}"
        )
    return t if t.stride() == x.stride() and not t.is_neg() else torch.empty_like(x).copy_(t)


def mask_bytes(mask: Tensor | None, size: int) -> Tensor | None:
    """A mask as contiguous bytes."""
    if mask is None:
        return None
    if mask.dtype != torch.bool or mask.numel() != size:
        raise ValueError(f"expected a bool mask of {size} elements, but got {tuple(mask.shape)} of {mask.dtype}")
    return mask.contiguous()


def sizes(x: Tensor) -> tuple[int, int, int]:
    """(batch, channels, positions) of (N, C, ...)."""
    batch, channels = x.shape[:2]
    positions = 1
    for size in x.shape[2:]:
        positions *= size
    return batch, channels, positions


def dense(x: Tensor) -> tuple[Tensor, int]:
    """`x`, copied only if its elements are not dense, and where its channels lie."""
    if x.dim() == 2:
        return x.contiguous(), CHANNELS_LAST
    if not x.is_contiguous() and x.movedim(1, -1).is_contiguous():
        return x, CHANNELS_LAST
    return x.contiguous(), CHANNELS_FIRST
