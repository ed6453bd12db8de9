"""The compiled CPU kernels as functions of tensors: check, allocate, call. csrc/include/normwise.h is their contract.

Inputs are float32, bfloat16 or float64; statistics are float64; gains and biases are computed with in float32 (float64
for float64 inputs) and their gradients come in that dtype. Nothing here knows of autograd.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from normwise.kernels.library import ISA_LEVELS, fault, load

ACTS: dict[str | None, int] = {None: 0, "relu": 1, "leaky_relu": 2, "silu": 3, "gelu": 4}
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}
_FIRST, _LAST = 0, 1

# The argument structs of normwise.h, in its order: pointers, int64, double, int32, padding.
_ROWS_FORWARD = struct.Struct("@9P2qd4i")
_ROWS_BACKWARD = struct.Struct("@11P2q4i")
_GROUPS_FORWARD = struct.Struct("@8P4qd3i4x")
_GROUPS_BACKWARD = struct.Struct("@12P4q3i4x")
_CHANNELS_FORWARD = struct.Struct("@10P3q2d5i4x")
_CHANNELS_BACKWARD = struct.Struct("@12P3q5i4x")
STRUCTS = (
    _ROWS_FORWARD,
    _ROWS_BACKWARD,
    _GROUPS_FORWARD,
    _GROUPS_BACKWARD,
    _CHANNELS_FORWARD,
    _CHANNELS_BACKWARD,
)


def available() -> bool:
    """Whether the compiled kernels can be used in this process."""
    return load().library is not None


def why_not() -> str | None:
    """What keeps the compiled kernels from being used, with the cure; None if nothing does."""
    return load().why_not


def isa() -> str:
    """The instruction set in use: "avx512", "avx2" or "baseline"."""
    return str(_library().nw_isa().decode())


def use_isa(name: str) -> None:
    """Switch the whole process to another instruction set. ValueError if the processor or the build lacks it."""
    if name not in ISA_LEVELS or _library().nw_use_isa(name.encode()) != 0:
        raise ValueError(f"instruction set {name!r} cannot run here: expected one of {', '.join(ISA_LEVELS)}")


def threads_used(threads: int) -> int:
    """How many threads a parallel region of the library gets when it asks for `threads`."""
    return int(_library().nw_threads(threads))


def obstacle(x: Tensor) -> str | None:
    """Why the kernels cannot take `x`, or None if they can."""
    if x.device.type != "cpu":
        return f"the C++ kernels run on the CPU, not on {x.device}"
    if x.dtype not in _DTYPES:
        return f"the C++ kernels take float32, bfloat16 and float64, not {x.dtype}"
    if x.layout != torch.strided or x.is_nested or x.is_conj() or x.is_neg():
        return "the C++ kernels take plain dense tensors"
    return why_not()


def mean_exceeds(mean: Tensor, rstd: Tensor, limit: float) -> bool:
    """Whether any |mean * rstd| is above `limit`; both float32, contiguous and on the CPU."""
    return bool(_library().nw_mean_exceeds(mean.data_ptr(), rstd.data_ptr(), mean.numel(), limit))


# --- rows ----------------------------------------------------------------------------------------------------------


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
    wide = _wide(x)
    weight, bias = _vector(weight, wide, cols), _vector(bias, wide, cols)
    y = torch.empty_like(x)
    stats = torch.empty((2, rows), dtype=torch.float64)
    s = x
    if residual is not None:
        residual = _like(residual, x)
        s = torch.empty_like(x)
    mask = _bytes(mask, rows)
    at = stats.data_ptr()
    _rows_forward(
        _ROWS_FORWARD.pack(
            x.data_ptr(),
            _at(residual),
            _at(mask),
            _at(weight),
            _at(bias),
            s.data_ptr(),
            y.data_ptr(),
            at,
            at + 8 * rows,
            rows,
            cols,
            eps,
            _DTYPES[x.dtype],
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
    wide = _wide(s)
    weight, bias = _vector(weight, wide, cols), _vector(bias, wide, cols)
    dy = _like(dy, s)
    if dsum is not None:
        dsum = _like(dsum, s)
    mask = _bytes(mask, rows)
    ds = torch.empty_like(s)
    dweight = None if weight is None else torch.empty_like(weight)
    dbias = None if bias is None else torch.empty_like(bias)
    at = stats.data_ptr()
    _rows_backward(
        _ROWS_BACKWARD.pack(
            dy.data_ptr(),
            _at(dsum),
            s.data_ptr(),
            _at(mask),
            _at(weight),
            _at(bias),
            at,
            at + 8 * rows,
            ds.data_ptr(),
            _at(dweight),
            _at(dbias),
            rows,
            cols,
            _DTYPES[s.dtype],
            center,
            ACTS[act],
            torch.get_num_threads(),
        )
    )
    return ds, dweight, dbias


# --- groups --------------------------------------------------------------------------------------------------------


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

    y = act((x - mean) * rstd * weight + bias + residual). `mask` (N, positions): bool, True = valid.
    """
    x = x.contiguous()
    batch, channels, positions = _sizes(x)
    wide = _wide(x)
    weight, bias = _vector(weight, wide, channels), _vector(bias, wide, channels)
    if residual is not None:
        residual = _like(residual, x)
    mask = _bytes(mask, batch * positions)
    y = torch.empty_like(x)
    stats = torch.empty((2, batch * groups), dtype=torch.float64)
    at = stats.data_ptr()
    _groups_forward(
        _GROUPS_FORWARD.pack(
            x.data_ptr(),
            _at(residual),
            _at(mask),
            _at(weight),
            _at(bias),
            y.data_ptr(),
            at,
            at + 8 * batch * groups,
            batch,
            channels,
            positions,
            groups,
            eps,
            _DTYPES[x.dtype],
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
    x = x.contiguous()
    batch, channels, positions = _sizes(x)
    wide = _wide(x)
    weight, bias = _vector(weight, wide, channels), _vector(bias, wide, channels)
    dy = _like(dy, x)
    mask = _bytes(mask, batch * positions)
    dx = torch.empty_like(x)
    dresidual = None
    if residual is not None:
        residual = _like(residual, x)
        dresidual = dy if act is None and mask is None else torch.empty_like(x)
    dweight = None if weight is None else torch.empty_like(weight)
    dbias = None if bias is None else torch.empty_like(bias)
    at = stats.data_ptr()
    _groups_backward(
        _GROUPS_BACKWARD.pack(
            dy.data_ptr(),
            x.data_ptr(),
            _at(residual),
            _at(mask),
            _at(weight),
            _at(bias),
            at,
            at + 8 * batch * groups,
            dx.data_ptr(),
            0 if dresidual is dy else _at(dresidual),
            _at(dweight),
            _at(dbias),
            batch,
            channels,
            positions,
            groups,
            _DTYPES[x.dtype],
            ACTS[act],
            torch.get_num_threads(),
        )
    )
    return dx, dweight, dbias, dresidual


# --- channels ------------------------------------------------------------------------------------------------------


def channels_forward(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    *,
    act: str | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """BatchNorm of (N, C, ...): (y, stats), stats (2, C): mean and rstd used. Moves the running averages in training.

    y = act((x - mean) * rstd * weight + bias + residual), in x's memory layout. `mask` (N, positions): bool, True =
    valid. Running averages are float32 (float64 for float64 inputs) and contiguous.
    """
    x, layout = _dense(x)
    batch, channels, positions = _sizes(x)
    wide = _wide(x)
    weight, bias = _vector(weight, wide, channels), _vector(bias, wide, channels)
    _check_running(running_mean, wide, channels)
    _check_running(running_var, wide, channels)
    if residual is not None:
        residual = _like(residual, x)
    mask = _bytes(mask, batch * positions)
    y = torch.empty_like(x)
    stats = torch.empty((2, channels), dtype=torch.float64)
    at = stats.data_ptr()
    _channels_forward(
        _CHANNELS_FORWARD.pack(
            x.data_ptr(),
            _at(residual),
            _at(mask),
            _at(weight),
            _at(bias),
            _at(running_mean),
            _at(running_var),
            y.data_ptr(),
            at,
            at + 8 * channels,
            batch,
            channels,
            positions,
            eps,
            momentum,
            _DTYPES[x.dtype],
            layout,
            training,
            ACTS[act],
            torch.get_num_threads(),
        )
    )
    return y, stats


def channels_backward(
    dy: Tensor,
    x: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    *,
    act: str | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dweight, dbias, dresidual)."""
    x, layout = _dense(x)
    batch, channels, positions = _sizes(x)
    wide = _wide(x)
    weight, bias = _vector(weight, wide, channels), _vector(bias, wide, channels)
    dy = _like(dy, x)
    mask = _bytes(mask, batch * positions)
    dx = torch.empty_like(x)
    dresidual = None
    if residual is not None:
        residual = _like(residual, x)
        dresidual = dy if act is None and mask is None else torch.empty_like(x)
    dweight = None if weight is None else torch.empty_like(weight)
    dbias = None if bias is None else torch.empty_like(bias)
    at = stats.data_ptr()
    _channels_backward(
        _CHANNELS_BACKWARD.pack(
            dy.data_ptr(),
            x.data_ptr(),
            _at(residual),
            _at(mask),
            _at(weight),
            _at(bias),
            at,
            at + 8 * channels,
            dx.data_ptr(),
            0 if dresidual is dy else _at(dresidual),
            _at(dweight),
            _at(dbias),
            batch,
            channels,
            positions,
            _DTYPES[x.dtype],
            layout,
            training,
            ACTS[act],
            torch.get_num_threads(),
        )
    )
    return dx, dweight, dbias, dresidual


# --- shared --------------------------------------------------------------------------------------------------------


def _library() -> ctypes.CDLL:
    library, why = load()
    if library is None:
        raise RuntimeError(f"the C++ kernels are not available: {why}")
    return library


def _kernel(name: str) -> Callable[[bytes], None]:
    """The C function `name`, which takes its packed argument struct; looked up at the first call."""
    function = None

    def call(arguments: bytes) -> None:
        nonlocal function
        if function is None:
            found = getattr(_library(), name)
            found.argtypes, found.restype = [ctypes.c_char_p], ctypes.c_int
            function = found
        status = function(arguments)
        if status:
            raise fault(status)

    return call


_rows_forward = _kernel("nw_rows_forward")
_rows_backward = _kernel("nw_rows_backward")
_groups_forward = _kernel("nw_groups_forward")
_groups_backward = _kernel("nw_groups_backward")
_channels_forward = _kernel("nw_channels_forward")
_channels_backward = _kernel("nw_channels_backward")


def _at(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _wide(x: Tensor) -> torch.dtype:
    """The dtype of gains, biases and running averages beside `x`."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _vector(t: Tensor | None, dtype: torch.dtype, size: int) -> Tensor | None:
    if t is None:
        return None
    if t.numel() != size:
        raise ValueError(f"expected a vector of {size} elements, but got one of shape {tuple(t.shape)}")
    return t if t.dtype == dtype and t.is_contiguous() else t.to(dtype).contiguous()


def _check_running(t: Tensor | None, dtype: torch.dtype, size: int) -> None:
    if t is not None and (t.dtype != dtype or t.numel() != size or not t.is_contiguous()):
        raise ValueError(
            f"running averages are updated in place: expected {size} contiguous elements of {dtype}, but got "
            f"{tuple(t.shape)} of {t.dtype}"
        )


def _like(t: Tensor, x: Tensor) -> Tensor:
    """`t` in the memory layout of `x`, which is dense."""
    if t.shape != x.shape or t.dtype != x.dtype:
        raise ValueError(
            f"expected a tensor like the input, {tuple(x.shape)} of {x.dtype}, but got {tuple(t.shape)} of {t.dtype}"
        )
    return t if t.stride() == x.stride() else torch.empty_like(x).copy_(t)


def _bytes(mask: Tensor | None, size: int) -> Tensor | None:
    if mask is None:
        return None
    if mask.dtype != torch.bool or mask.numel() != size:
        raise ValueError(f"expected a bool mask of {size} elements, but got {tuple(mask.shape)} of {mask.dtype}")
    return mask.contiguous()


def _sizes(x: Tensor) -> tuple[int, int, int]:
    batch, channels = x.shape[:2]
    positions = 1
    for size in x.shape[2:]:
        positions *= size
    return batch, channels, positions


def _dense(x: Tensor) -> tuple[Tensor, int]:
    """`x`, copied only if its elements are not dense, and where its channels lie."""
    if x.dim() == 2:
        return x.contiguous(), _LAST
    if not x.is_contiguous() and x.movedim(1, -1).is_contiguous():
        return x, _LAST
    return x.contiguous(), _FIRST
