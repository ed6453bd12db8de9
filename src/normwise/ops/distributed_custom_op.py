"""`ops.distributed_norm` as a registered op, for torch.compile and torch.export: the exchange is one node.

Imported when the first layer with other ranks is made, since registering takes milliseconds that `import normwise`
need not spend.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import distributed_c10d

from normwise.backends.reference import accumulation_dtype
from normwise.ops.distributed_norm import Settings, backward_of, forward


@torch.library.custom_op("normwise::distributed_norm", mutates_args=())
def _distributed_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    dims: Sequence[int],
    group_name: str,
    eps: float,
    center: bool,
    count_each: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`forward` as one node while compiling: the exchange takes place when it runs, in its place among others."""
    group = _group(group_name)
    y, mean, var, count, rough, offset, rstd = forward(
        x, weight, bias, mask, Settings(tuple(dims), group, eps, center, count_each)
    )
    return y, mean, var, count, rough, offset, rstd


@_distributed_norm.register_fake
def _(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    dims: Sequence[int],
    group_name: str,
    eps: float,
    center: bool,
    count_each: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    wide = accumulation_dtype(x.dtype)
    shape = [1 if d in dims else s for d, s in enumerate(x.shape)]
    counts = [1] * x.dim() if mask is None else [1 if d in dims else s for d, s in enumerate(mask.shape)]
    pooled = shape if count_each else counts
    means = shape if center else pooled
    rough = shape if center else counts
    return (
        torch.empty_like(x),
        x.new_empty(means, dtype=torch.float64),
        x.new_empty(shape, dtype=torch.float64),
        x.new_empty(pooled, dtype=torch.float64),
        x.new_empty(rough, dtype=wide),
        x.new_empty(torch.broadcast_shapes(means, rough), dtype=wide),
        x.new_empty(shape, dtype=wide),
    )


@torch.library.custom_op("normwise::distributed_norm_backward", mutates_args=())
def _distributed_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    rough: Tensor,
    offset: Tensor,
    rstd: Tensor,
    count: Tensor,
    dims: Sequence[int],
    group_name: str,
    eps: float,
    center: bool,
    count_each: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    group = _group(group_name)
    settings = Settings(tuple(dims), group, eps, center, count_each)
    dx, *rest = backward_of(dy, x, weight, bias, mask, rough, offset, rstd, count, settings)
    # Cloned, because a gradient that needed no sum over broadcast axes is `dy` itself, and an op's outputs may not be.
    dweight, dbias = (x.new_empty(0) if g is None else g.clone() for g in rest)
    return dx, dweight, dbias


@_distributed_norm_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    rough: Tensor,
    offset: Tensor,
    rstd: Tensor,
    count: Tensor,
    dims: Sequence[int],
    group_name: str,
    eps: float,
    center: bool,
    count_each: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(x),
        x.new_empty(0) if weight is None else torch.empty_like(weight),
        x.new_empty(0) if bias is None else torch.empty_like(bias),
    )


def _group(name: str) -> Any:
    """The process group of this name: an op takes no process group."""
    return distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined,arg-type]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, bias, mask, *ctx.settings = inputs
    _, _, _, count, *kept = output
    ctx.save_for_backward(x, weight, bias, mask, *kept, count)


def _differentiate(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Any, ...]:
    x, weight, bias, *rest = ctx.saved_tensors
    dx, dweight, dbias = _distributed_norm_backward(dy, x, weight, bias, *rest, *ctx.settings)
    return dx, None if weight is None else dweight, None if bias is None else dbias, *(None,) * 6


_distributed_norm.register_autograd(_differentiate, setup_context=_save)
