"""In what form the kernels get tensors: dtypes, layouts, addresses.

That C may read them at all, `normwise.ops.dispatch` has seen to.
"""

from __future__ import annotations

import torch
from torch import Tensor

# nw_act of the header.
ACTS: dict[str | None, int] = {
    None: 0,
    "relu": 1,
    "leaky_relu": 2,
    "silu": 3,
    "gelu": 4,
    "relu6": 5,
    "hardswish": 6,
    "hardsigmoid": 7,
    "elu": 8,
    "gelu_tanh": 9,
    "softplus": 10,
    "mish": 11,
}
GATE_ACTS: dict[str | None, int] = {None: 0, "relu": 1, "silu": 3, "swish": 3, "gelu": 4, "sigmoid": 12}
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}
CHANNELS_FIRST, CHANNELS_LAST = 0, 1


def address(t: Tensor | None) -> int:
    """Where `t` lies in memory, 0 for none."""
    return 0 if t is None else t.data_ptr()


def parameter_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of gains, biases and running averages beside an input of `dtype`."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def vector(t: Tensor | None, dtype: torch.dtype, size: int) -> Tensor | None:
    """A gain or bias as the kernels read it: `size` elements, contiguous, in their dtype."""
    if t is None:
        return None
    if t.numel() != size:
        raise ValueError(f"expected a vector of {size} elements, but got one of shape {tuple(t.shape)}")
    return t if t.dtype is dtype and t.is_contiguous() else t.to(dtype).contiguous()


def mask_bytes(mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A mask as contiguous bytes of this shape, to which it broadcasts."""
    if mask.dtype is not torch.bool:
        raise ValueError(f"expected a bool mask, but got one of {mask.dtype}")
    return mask.expand(shape).contiguous()


def of_parameter(grad: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    """A gain's or bias's gradient in its own dtype and shape."""
    if grad is None or parameter is None or grad.dtype is parameter.dtype:
        return grad
    return grad.to(parameter.dtype)


def statistics(t: Tensor, count: int) -> Tensor:
    """Mean and reciprocal deviation as a forward kernel wrote them, `count` of each: what hooks on saved tensors give
    back may lie otherwise."""
    if t.numel() != 2 * count:
        raise ValueError(f"expected {2 * count} saved statistics, but got {tuple(t.shape)}")
    return t.to(torch.float64).contiguous()


def laid_out_like(t: Tensor, x: Tensor) -> Tensor:
    """`t`, of the shape and dtype of `x`, in the memory layout of `x`, which is dense."""
    if t.shape != x.shape or t.dtype is not x.dtype:
        raise ValueError(
            f"expected a tensor like the input, {tuple(x.shape)} of {x.dtype}, but got {tuple(t.shape)} of {t.dtype}"
        )
    return t if t.stride() == x.stride() else torch.empty_like(x).copy_(t)


def dense(x: Tensor) -> tuple[Tensor, int]:
    """(N, C, ...) in a layout that the kernels walk through, copied if need be, and which one it is."""
    if x.is_contiguous():
        return x, CHANNELS_FIRST
    if x.movedim(1, -1).is_contiguous():
        return x, CHANNELS_LAST
    return x.contiguous(), CHANNELS_FIRST
