"""In what form the kernels get tensors: dtypes and layouts. That they may be read at all, ops/dispatch.py sees to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def wide(dtype: torch.dtype) -> Any:
    """The dtype that a kernel computes in, in Triton's words."""
    import triton.language as tl

    return tl.float64 if dtype is torch.float64 else tl.float32


def vector(t: Tensor | None, size: int) -> Tensor | None:
    """A gain or bias: `size` elements, contiguous."""
    if t is None:
        return None
    if t.numel() != size:
        raise ValueError(f"expected a vector of {size} elements, but got one of shape {tuple(t.shape)}")
    return t.contiguous()


def mask_bytes(mask: Tensor, shape: Sequence[int]) -> Tensor:
    """A mask as contiguous bytes of this shape, to which it broadcasts."""
    if mask.dtype is not torch.bool:
        raise ValueError(f"expected a bool mask, but got one of {mask.dtype}")
    return mask.expand(*shape).contiguous().view(torch.uint8)


def laid_out_like(t: Tensor, x: Tensor) -> Tensor:
    """`t`, of the shape and dtype of `x`, in the memory layout of `x`, which is dense."""
    if t.shape != x.shape or t.dtype is not x.dtype:
        raise ValueError(
            f"expected a tensor like the input, {tuple(x.shape)} of {x.dtype}, but got {tuple(t.shape)} of {t.dtype}"
        )
    return t if t.stride() == x.stride() else torch.empty_like(x).copy_(t)


def statistics(t: Tensor, count: int) -> Tensor:
    """Mean and reciprocal deviation as a forward wrote them, `count` of each: what hooks on saved tensors give back
    may lie otherwise."""
    if t.numel() != 2 * count:
        raise ValueError(f"expected {2 * count} saved statistics, but got {tuple(t.shape)}")
    return t.to(torch.float64).contiguous()
