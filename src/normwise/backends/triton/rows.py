"""LayerNorm and RMSNorm: launches of the kernels that hold a row whole."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from normwise.backends.protocol import NormConfig, NormGradients, NormRequest, NormResult
from normwise.backends.triton import runtime, settings
from normwise.backends.triton.memory import laid_out_like, mask_bytes, statistics, vector, wide


def forward(request: NormRequest, needs_grad: bool) -> NormResult:
    """Of the last `config.axes` axes. One launch."""
    config, x, residual, weight, bias, mask, *_ = request
    x = x.contiguous()
    rows, cols = _size(config, x)
    total, y = x, torch.empty_like(x)
    if residual is not None:
        residual, total = laid_out_like(residual, x), torch.empty_like(x)
    stats = x.new_empty((2, rows), dtype=torch.float64) if needs_grad else None
    if x.numel() == 0:
        return NormResult(y, total, None if stats is None else stats.zero_())
    from normwise.backends.triton.kernels import rows as kernels

    launch = settings.of_rows(rows, cols, x.dtype)
    mask, by_element = _mask(config, mask, x)
    with runtime.on_device_of(x):
        kernels.rows_forward[(runtime.blocks(rows, launch.block_rows),)](
            x,
            residual,
            mask,
            vector(weight, cols),
            vector(bias, cols),
            total,
            y,
            stats,
            rows,
            cols,
            EPS=config.eps,
            CENTER=config.center,
            ACT=config.act,
            BY_ELEMENT=by_element,
            WIDE=wide(x.dtype),
            BLOCK_ROWS=launch.block_rows,
            BLOCK_COLS=launch.block_cols,
            num_warps=launch.num_warps,
        )
    return NormResult(y, total, stats)


def backward(
    config: NormConfig,
    total: Tensor,
    _residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    stats: Tensor,
    dy: Tensor,
    dtotal: Tensor | None,
) -> NormGradients:
    """One launch, and another where there is a gain or bias: sums of parts of the rows, and the sum of these."""
    total = total.contiguous()
    rows, cols = _size(config, total)
    dx = torch.empty_like(total)
    dweight, dbias = (
        None if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (weight, bias)
    )
    if total.numel() == 0:
        return NormGradients(dx, dx, *(None if t is None else t.zero_() for t in (dweight, dbias)))
    from normwise.backends.triton.kernels import rows as kernels
    from normwise.backends.triton.kernels.common import sum_of_parts

    launch = settings.of_rows(rows, cols, total.dtype)
    parts = runtime.blocks(rows, launch.rows_per_program)
    kind = torch.float64 if total.dtype is torch.float64 else torch.float32
    dweights, dbiases = (None if t is None else total.new_empty((parts, cols), dtype=kind) for t in (weight, bias))
    mask, by_element = _mask(config, mask, total)
    with runtime.on_device_of(total):
        kernels.rows_backward[(parts,)](
            laid_out_like(dy, total),
            None if dtotal is None else laid_out_like(dtotal, total),
            total,
            mask,
            vector(weight, cols),
            vector(bias, cols),
            statistics(stats, rows),
            dx,
            dweights,
            dbiases,
            rows,
            cols,
            launch.rows_per_program,
            CENTER=config.center,
            ACT=config.act,
            BY_ELEMENT=by_element,
            WIDE=wide(total.dtype),
            BLOCK_ROWS=launch.block_rows,
            BLOCK_COLS=launch.block_cols,
            num_warps=launch.num_warps,
        )
        if dweights is not None or dbiases is not None:
            columns = min(runtime.power_of_2(cols), 32)
            sum_of_parts[(runtime.blocks(cols, columns),)](
                dweights, dbiases, dweight, dbias, parts, cols, cols, 1, BLOCK_PARTS=64, BLOCK_COLUMNS=columns
            )
    return NormGradients(dx, dx, dweight, dbias)


def _size(config: NormConfig, x: Tensor) -> tuple[int, int]:
    cols = prod(x.shape[x.dim() - config.axes :])
    return prod(x.shape[: x.dim() - config.axes]), cols


def _mask(config: NormConfig, mask: Tensor | None, x: Tensor) -> tuple[Tensor | None, bool]:
    """The mask as a byte for each row, or for each element, and whether for each element."""
    if mask is None:
        return None, False
    rows = x.dim() - config.axes
    by_element = any(mask.shape[d] != 1 for d in range(rows, x.dim()))
    return mask_bytes(mask, x.shape if by_element else (*x.shape[:rows], *(1,) * config.axes)), by_element
