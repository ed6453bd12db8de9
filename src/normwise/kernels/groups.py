"""GroupNorm and InstanceNorm by the compiled CPU kernels: statistics of a group of channels of one sample.

Tensors in, tensors out: check, allocate, call. csrc/include/normwise.h is the contract.
"""

from __future__ import annotations

import torch
from torch import Tensor

from normwise.kernels.arguments import ACTS, DTYPES, at, dense, like, mask_bytes, sizes, statistics, vector, wide
from normwise.kernels.library import kernel
from normwise.kernels.structs import GROUPS_BACKWARD, GROUPS_FORWARD, packer

_FORWARD, _BACKWARD = packer(GROUPS_FORWARD), packer(GROUPS_BACKWARD)
STRUCTS = (_FORWARD, _BACKWARD)

_forward = kernel("nw_groups_forward")
_backward = kernel("nw_groups_backward")


def groups_forward(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    act: str | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """GroupNorm of (N, C, ...), InstanceNorm with groups = C: (y, stats), stats (2, N * groups): mean and rstd.

    y = act((x - mean) * rstd * weight + bias + residual), in x's memory layout. `mask` (N, positions): bool, True =
    valid.
    """
    x, layout = dense(x)
    batch, channels, positions = sizes(x)
    dtype = wide(x)
    weight, bias = vector(weight, dtype, channels), vector(bias, dtype, channels)
    if residual is not None:
        residual = like(residual, x)
    mask = mask_bytes(mask, batch * positions)
    y = torch.empty_like(x)
    stats = x.new_empty(2, batch * groups, dtype=torch.float64)
    mean = stats.data_ptr()
    _forward(
        _FORWARD.pack(
            x.data_ptr(),
            at(residual),
            at(mask),
            at(weight),
            at(bias),
            y.data_ptr(),
            mean,
            mean + 8 * batch * groups,
            batch,
            channels,
            positions,
            groups,
            eps,
            DTYPES[x.dtype],
            layout,
            ACTS[act],
            torch.get_num_threads(),
        )
    )
    return y, stats


def groups_backward(
    dy: Tensor,
    x: Tensor,
    stats: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    act: str | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dweight, dbias, dresidual)."""
    x, layout = dense(x)
    batch, channels, positions = sizes(x)
    dtype = wide(x)
    weight, bias = vector(weight, dtype, channels), vector(bias, dtype, channels)
    dy = like(dy, x)
    mask = mask_bytes(mask, batch * positions)
    dx = torch.empty_like(x)
    dresidual = None
    if residual is not None:
        residual = like(residual, x)
        dresidual = dy if act is None and mask is None else torch.empty_like(x)
    dweight = None if weight is None else torch.empty_like(weight)
    dbias = None if bias is None else torch.empty_like(bias)
    stats = statistics(stats, batch * groups)
    mean = stats.data_ptr()
    _backward(
        _BACKWARD.pack(
            dy.data_ptr(),
            x.data_ptr(),
            at(residual),
            at(mask),
            at(weight),
            at(bias),
            mean,
            mean + 8 * batch * groups,
            dx.data_ptr(),
            0 if dresidual is dy else at(dresidual),
            at(dweight),
            at(dbias),
            batch,
            channels,
            positions,
            groups,
            DTYPES[x.dtype],
            layout,
            ACTS[act],
            torch.get_num_threads(),
        )
    )
    return dx, dweight, dbias, dresidual
