"""LayerNorm and RMSNorm by the compiled CPU kernels: statistics of runs of neighbours in memory.

Tensors in, tensors out: check, allocate, call. csrc/include/normwise.h is the contract.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import torch
from torch import Tensor

from normwise.kernels.arguments import ACTS, DTYPES, at, like, mask_bytes, statistics, vector, wide
from normwise.kernels.library import kernel
from normwise.kernels.structs import ROWS_BACKWARD, ROWS_FORWARD, packer

_FORWARD, _BACKWARD = packer(ROWS_FORWARD), packer(ROWS_BACKWARD)
STRUCTS = (_FORWARD, _BACKWARD)
# The same for plain calls: float32 and no activation are 0, as are null pointers to what such a call has not.
_PLAIN_FORWARD = struct.Struct("@P16x2P8x3P2qd4xi4xi")
_PLAIN_BACKWARD = struct.Struct("@P8xP8xP8x5P2q4xi4xi")
PLAIN_STRUCTS = (_PLAIN_FORWARD, _PLAIN_BACKWARD)

_empty_like, _threads, _float64 = torch.empty_like, torch.get_num_threads, torch.float64

_forward = kernel("nw_rows_forward")
_backward = kernel("nw_rows_backward")


class Rows(NamedTuple):
    """What `rows_forward` returns."""

    y: Tensor
    sum: Tensor  # x + residual; x itself where there was none
    stats: Tensor  # (2, rows): mean and rstd


def rows_forward(
    x: Tensor,
    cols: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    center: bool = True,
    act: str | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
) -> Rows:
    """LayerNorm, or RMSNorm if not `center`, of every run of `cols` neighbours in contiguous order.

    y = act((s - mean) * rstd * weight + bias) with s = x + residual. `weight` and `bias` have `cols` elements, `mask`
    (bool, True = valid) one for each row: the others come out 0.
    """
    x = x.contiguous()
    rows = x.numel() // cols
    dtype = wide(x)
    weight, bias = vector(weight, dtype, cols), vector(bias, dtype, cols)
    y = torch.empty_like(x)
    stats = x.new_empty(2, rows, dtype=torch.float64)
    s = x
    if residual is not None:
        residual = like(residual, x)
        s = torch.empty_like(x)
    mask = mask_bytes(mask, rows)
    mean = stats.data_ptr()
    _forward(
        _FORWARD.pack(
            x.data_ptr(),
            at(residual),
            at(mask),
            at(weight),
            at(bias),
            s.data_ptr(),
            y.data_ptr(),
            mean,
            mean + 8 * rows,
            rows,
            cols,
            eps,
            DTYPES[x.dtype],
            center,
            ACTS[act],
            torch.get_num_threads(),
        )
    )
    return Rows(y, s, stats)


def rows_backward(
    dy: Tensor,
    s: Tensor,
    stats: Tensor,
    cols: int,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    center: bool = True,
    act: str | None = None,
    mask: Tensor | None = None,
    dsum: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(ds, dweight, dbias); `ds` is the gradient of x and of residual. `dsum`: what reaches s by other ways."""
    s = s.contiguous()
    rows = s.numel() // cols
    dtype = wide(s)
    weight, bias = vector(weight, dtype, cols), vector(bias, dtype, cols)
    dy = like(dy, s)
    if dsum is not None:
        dsum = like(dsum, s)
    mask = mask_bytes(mask, rows)
    ds = torch.empty_like(s)
    dweight = None if weight is None else torch.empty_like(weight)
    dbias = None if bias is None else torch.empty_like(bias)
    stats = statistics(stats, rows)
    mean = stats.data_ptr()
    _backward(
        _BACKWARD.pack(
            dy.data_ptr(),
            at(dsum),
            s.data_ptr(),
            at(mask),
            at(weight),
            at(bias),
            mean,
            mean + 8 * rows,
            ds.data_ptr(),
            at(dweight),
            at(dbias),
            rows,
            cols,
            DTYPES[s.dtype],
            center,
            ACTS[act],
            torch.get_num_threads(),
        )
    )
    return ds, dweight, dbias


def plain_rows_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, rows: int, cols: int, eps: float, center: bool, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """y of `rows_forward` without residual, mask and activation, where everything is contiguous float32, and if `keep`
    the statistics that `plain_rows_backward` asks for.

    On small tensors what Python does takes longer than the kernel: nothing is checked here, callers vouch for it.
    """
    y = _empty_like(x)
    stats = x.new_empty((2, rows), dtype=_float64) if keep else None
    mean = stats.data_ptr() if stats is not None else 0
    _forward(
        _PLAIN_FORWARD.pack(
            x.data_ptr(),
            0 if weight is None else weight.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            y.data_ptr(),
            mean,
            mean + 8 * rows if keep else 0,
            rows,
            cols,
            eps,
            center,
            _threads(),
        )
    )
    return y, stats


def plain_rows_backward(
    dy: Tensor,
    x: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    has_bias: bool,
    rows: int,
    cols: int,
    center: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(dx, dweight, dbias) of `plain_rows_forward`, with `dy` contiguous float32 too, and a bias only with a gain."""
    dx = _empty_like(x)
    dweight = None if weight is None else _empty_like(weight)
    dbias = _empty_like(weight) if weight is not None and has_bias else None
    mean = stats.data_ptr()
    _backward(
        _PLAIN_BACKWARD.pack(
            dy.data_ptr(),
            x.data_ptr(),
            0 if weight is None else weight.data_ptr(),
            mean,
            mean + 8 * rows,
            dx.data_ptr(),
            0 if dweight is None else dweight.data_ptr(),
            0 if dbias is None else dbias.data_ptr(),
            rows,
            cols,
            center,
            _threads(),
        )
    )
    return dx, dweight, dbias
