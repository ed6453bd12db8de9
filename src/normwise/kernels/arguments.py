"""What the compiled kernels of all norms take: dtypes, layouts and small tensors as they expect them.

Inputs are float32, bfloat16 or float64; statistics are float64; gains and biases are computed with in float32 (float64
for float64 inputs) and their gradients come in that dtype. Nothing here knows of autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor

ACTS: dict[str | None, int] = {None: 0, "relu": 1, "leaky_relu": 2, "silu": 3, "gelu": 4}
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}
CHANNELS_FIRST, CHANNELS_LAST = 0, 1


# What torch's dispatcher knows of a dense tensor on the CPU. Whatever else it knows of a tensor (a wrapper subclass, a
# functional or batched tensor, a negative or conjugate bit, another layout or device, zeros without memory) means that
# the elements are not those that lie at `data_ptr()`.
_KNOWN = 0
for _key in ("CPU", "AutogradCPU", "AutocastCPU", "ADInplaceOrView"):
    _KNOWN |= torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, _key)).raw_repr()
_FOREIGN = ~_KNOWN

_TENSORS = (torch.Tensor, torch.nn.Parameter)
_dispatch_keys = torch._C._dispatch_keys


def readable(*tensors: Tensor | None) -> bool:
    """Whether C may read each of these where its `data_ptr()` points: the one condition for a tensor to go to a kernel.

    That is a dense tensor on the CPU which is nothing but a tensor, and has memory. None is none, and may go.
    """
    for t in tensors:
        if t is not None and (
            type(t) not in _TENSORS or _dispatch_keys(t).raw_repr() & _FOREIGN or (t.data_ptr() == 0 and t.numel() > 0)
        ):
            return False
    return True


def unreadable(*tensors: Tensor | None) -> str | None:
    """What keeps kernels from tensors that are not `readable`, or None."""
    if readable(*tensors):
        return None
    found = next(t for t in tensors if not readable(t))
    assert found is not None
    return f"the C++ kernels take plain dense tensors on the CPU, not {_described(found)}"


def _described(t: Tensor) -> str:
    if type(t) not in _TENSORS:
        return type(t).__name__
    if t.device.type != "cpu":
        return f"a tensor on {t.device}"
    kinds = {"negative": t.is_neg(), "conjugate": t.is_conj(), "nested": t.is_nested, "quantized": t.is_quantized}
    kind = next((name for name, found in kinds.items() if found), None)
    if kind is None:
        kind = "wrapped" if t.layout is torch.strided else str(t.layout).removeprefix("torch.")
    return f"a {kind} tensor"


def statistics(t: Tensor, count: int) -> Tensor:
    """Mean and reciprocal deviation as a forward kernel wrote them, `count` of each: what hooks on saved tensors give
    back may lie otherwise."""
    if t.numel() != 2 * count:
        raise ValueError(f"expected {2 * count} saved statistics, but got {tuple(t.shape)}")
    return t.to(torch.float64).contiguous()


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
