"""LayerNorm and RMSNorm: launches of the kernels that hold a row whole."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from normwise.backends.protocol import Gate, NormConfig, NormGradients, NormRequest, NormResult
from normwise.backends.triton import runtime, settings
from normwise.backends.triton.memory import laid_out_like, mask_bytes, statistics, vector, wide


def forward(request: NormRequest, needs_grad: bool, gate: Gate | None = None) -> NormResult:
    """Of the last `config.axes` axes, by a gain and bias of all rows or of neighbouring ones. One launch."""
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

    groups = _groups(weight, bias, cols)
    launch = settings.of_rows(rows, cols, x.dtype, rows // groups)
    mask, by_element = _mask(config, mask, x)
    with runtime.on_device_of(x):
        kernels.rows_forward[(launch.blocks if launch.slots else groups * launch.blocks,)](
            x,
            residual,
            mask,
            vector(weight, groups * cols),
            vector(bias, groups * cols),
            None if gate is None else laid_out_like(gate.values, x),
            total,
            y,
            stats,
            rows,
            cols,
            None if groups == 1 else rows // groups,
            None if groups == 1 else launch.blocks,
            EPS=config.eps,
            **_constants(config, gate, launch, x.dtype, by_element),
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
    gate: Gate | None = None,
) -> NormGradients:
    """One launch, and another where a gain or bias is of more rows than a program sums: the sum of their parts."""
    total = total.contiguous()
    rows, cols = _size(config, total)
    dx = torch.empty_like(total)
    dgate = None if gate is None else torch.empty_like(total)
    dweight, dbias = (
        None if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (weight, bias)
    )
    if total.numel() == 0:
        for t in (dweight, dbias):
            if t is not None:
                t.zero_()
        return NormGradients(dx, dx, dweight, dbias, dgate)
    from normwise.backends.triton.kernels import rows as kernels
    from normwise.backends.triton.kernels.common import sum_of_parts

    groups = _groups(weight, bias, cols)
    launch = settings.of_rows(rows, cols, total.dtype, rows // groups)
    parts = groups * launch.parts
    sum_weight, sum_bias = dweight, dbias
    if launch.parts > 1:
        kind = torch.float64 if total.dtype is torch.float64 else torch.float32
        sum_weight, sum_bias = (
            None if t is None else total.new_empty((parts, cols), dtype=kind) for t in (dweight, dbias)
        )
    mask, by_element = _mask(config, mask, total)
    with runtime.on_device_of(total):
        kernels.rows_backward[(launch.blocks if launch.slots else parts,)](
            laid_out_like(dy, total),
            None if dtotal is None else laid_out_like(dtotal, total),
            total,
            mask,
            vector(weight, groups * cols),
            vector(bias, groups * cols),
            None if gate is None else laid_out_like(gate.values, total),
            statistics(stats, rows),
            dx,
            dgate,
            sum_weight,
            sum_bias,
            rows,
            cols,
            launch.rows_per_program,
            None if groups == 1 else rows // groups,
            None if groups == 1 else launch.parts,
            **_constants(config, gate, launch, total.dtype, by_element),
        )
        if launch.parts > 1 and not (dweight is None and dbias is None):
            columns = min(runtime.power_of_2(cols), 32)
            sum_of_parts[(groups * runtime.blocks(cols, columns),)](
                sum_weight,
                sum_bias,
                dweight,
                dbias,
                launch.parts,
                cols,
                cols,
                1,
                BLOCK_PARTS=64,
                BLOCK_COLUMNS=columns,
            )
    return NormGradients(dx, dx, dweight, dbias, dgate)


def _size(config: NormConfig, x: Tensor) -> tuple[int, int]:
    cols = prod(x.shape[x.dim() - config.axes :])
    return prod(x.shape[: x.dim() - config.axes]), cols


def _groups(weight: Tensor | None, bias: Tensor | None, cols: int) -> int:
    """How many groups of neighbouring rows have a gain and bias each."""
    given = bias if weight is None else weight
    return 1 if given is None else given.numel() // cols


def _constants(
    config: NormConfig, gate: Gate | None, launch: settings.Rows, dtype: torch.dtype, by_element: bool
) -> dict[str, Any]:
    """What both kernels are compiled for."""
    gate_act = None if gate is None else gate.act
    return {
        "CENTER": config.center,
        "ACT": config.act,
        "GATE_ACT": "silu" if gate_act == "swish" else gate_act,
        "GATE_FIRST": gate is not None and gate.first,
        "SLOTS": launch.slots,
        "BY_ELEMENT": by_element,
        "WIDE": wide(dtype),
        "BLOCK_ROWS": launch.block_rows,
        "BLOCK_COLS": launch.block_cols,
        "num_warps": launch.num_warps,
    }


def _mask(config: NormConfig, mask: Tensor | None, x: Tensor) -> tuple[Tensor | None, bool]:
    """The mask as a byte for each row, or for each element, and whether for each element."""
    if mask is None:
        return None, False
    rows = x.dim() - config.axes
    by_element = any(mask.shape[d] != 1 for d in range(rows, x.dim()))
    return mask_bytes(mask, x.shape if by_element else (*x.shape[:rows], *(1,) * config.axes)), by_element
