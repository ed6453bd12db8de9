"""What LayerNorm and RMSNorm share: statistics over chosen axes of one sample, gain and bias per feature."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from normwise.ops import check, compiled, ragged, ranks
from normwise.ops.choose import Call, choose
from normwise.ops.norm import norm
from normwise.ops.pooled_norm import pooled_norm
from normwise.reference import activation

Aten = Callable[[Tensor, list[int], Tensor | None, Tensor | None, float], Tensor | None]


def feature_norm(
    op: str,
    aten: Aten,
    x: Any,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    center: bool,
    dim: int | Sequence[int] | None,
    mask: Tensor | None,
    lengths: Tensor | None,
    act: str | None,
    residual: Any,
    process_group: Any = None,
) -> Any:
    """y = act(norm(x + residual)); with a residual the pair (y, x + residual).

    `aten` is torch's own op, which returns None where its result lost digits. `process_group` (or a layer's `Peers`):
    the features are spread over its ranks, and these are this rank's shard.
    """
    if ragged.is_ragged(x):
        if dim is not None:
            raise ValueError(f"dim={dim} needs a padded tensor: rows of a ragged one have trailing features only")
        rows = partial(
            feature_norm,
            op,
            aten,
            normalized_shape=normalized_shape,
            weight=weight,
            bias=bias,
            eps=eps,
            center=center,
            dim=None,
            mask=None,
            lengths=None,
            act=act,
            process_group=process_group,
        )
        return ragged.by_rows(rows, x, mask=mask, lengths=lengths, residual=residual)
    check.floating(op, x)
    check.positive_eps(eps)
    check.like_normalized_shape("weight", weight, normalized_shape)
    check.like_normalized_shape("bias", bias, normalized_shape)
    check.same_shape("residual", residual, x)
    check.beside(x, mask=mask, residual=residual, weight=weight, bias=bias)
    dims = feature_dims(x, normalized_shape, dim)
    if lengths is not None and dims == (x.dim() - 1,):
        raise ValueError(
            "lengths counts valid steps along the last axis, but here the last axis holds the features that are "
            "normalized: "
            "give mask= of shape (N, L), True = valid, or normalize the channels of (N, C, L) by dim=1"
        )
    valid = check.validity(x, mask, lengths, channel_dim=dims[0] if dim is not None else x.dim() - 1)
    transform = None if act is None else activation(act)
    group = None
    if process_group is not None:
        group = ranks.peers(process_group).group(op, x.device, _row_facts(x, dims, valid))
    call = Call(op, x, dims, weight=weight, bias=bias, mask=valid, residual=residual, over_ranks=group is not None)
    if choose(call).backend == "cpu":
        return _compiled(x, dims, weight, bias, eps, center, valid, act, residual)
    if residual is not None:
        x = x + residual
    if valid is not None:
        x = x.masked_fill(~valid, 0)
    y = _standardized(op, aten, x, normalized_shape, dims, weight, bias, eps, center, valid, group)
    if transform is not None:
        y = transform(y)  # of 0 is 0: invalid positions stay so
    return y if residual is None else (y, x)


def feature_dims(x: Tensor, normalized_shape: Sequence[int], dim: int | Sequence[int] | None) -> tuple[int, ...]:
    """The axes of `x` that hold `normalized_shape`, in its order: the last ones, or those named by `dim`."""
    shape = tuple(normalized_shape)
    if not shape:
        raise check.ShapeError(
            "Expected normalized_shape to be at least 1-dimensional, but got normalized_shape = []: name the size of "
            "each "
            "normalized axis"
        )
    if dim is None:
        if x.dim() < len(shape) or tuple(x.shape[x.dim() - len(shape) :]) != shape:
            raise check.ShapeError(
                f"Given normalized_shape={list(shape)}, expected input with shape [*, {', '.join(map(str, shape))}], "
                "but got "
                f"input of size{list(x.shape)}: the input must end in normalized_shape; for other axes use dim="
            )
        return tuple(range(x.dim() - len(shape), x.dim()))
    named = (dim,) if isinstance(dim, int) else tuple(dim)
    if len(named) != len(shape):
        raise ValueError(f"dim={dim} names {len(named)} axes, but normalized_shape={list(shape)} has {len(shape)}")
    if any(not -x.dim() <= d < x.dim() for d in named):
        raise check.ShapeError(
            f"Dimension out of range: dim={dim} for an input of shape {tuple(x.shape)} with {x.dim()} axes"
        )
    dims = tuple(d % x.dim() for d in named)
    if len(set(dims)) < len(dims):
        raise ValueError(f"dim={dim} names an axis of the input of shape {tuple(x.shape)} twice")
    found = tuple(x.shape[d] for d in dims)
    if found != shape:
        raise check.ShapeError(
            f"Given normalized_shape={list(shape)}, expected an input with these sizes at dim={dim}, but got "
            f"{list(found)} "
            f"in an input of size{list(x.shape)}"
        )
    return dims


def _standardized(
    op: str,
    aten: Aten,
    x: Tensor,
    normalized_shape: Sequence[int],
    dims: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    center: bool,
    valid: Tensor | None,
    group: dist.ProcessGroup | None,
) -> Tensor:
    # A row is valid as a whole where the mask does not vary along the normalized axes. Its padding is 0 by now, so
    # an unmasked kernel does the job, and the rest is putting 0 where the bias went.
    whole_rows = valid is None or all(valid.shape[d] == 1 for d in dims)
    call = Call(op, x, dims, weight=weight, bias=bias, mask=None if whole_rows else valid, over_ranks=group is not None)
    y = None
    if choose(call).backend == "torch":
        y = aten(x, list(normalized_shape), weight, bias, eps)
    if y is not None:
        return y if valid is None else y.masked_fill(~valid, 0)
    x = as_autocast(x)
    gain, shift = _spread(weight, x, dims), _spread(bias, x, dims)
    if group is None:
        return norm(x, dims, gain, shift, mask=valid, eps=eps, center=center)[0]
    # A row that is valid here may be partly invalid in another shard, so a mask always says how many count.
    counted = valid is not None
    return pooled_norm(x, dims, gain, shift, group, mask=valid, eps=eps, center=center, count_each=counted)[0]


def _row_facts(x: Tensor, dims: tuple[int, ...], valid: Tensor | None) -> dict[str, int]:
    """What ranks that hold the shards of the same rows must agree on, so that their messages are of one size."""
    rows = math.prod([s for d, s in enumerate(x.shape) if d not in dims])
    return {"number of rows": rows, "masked": int(valid is not None)}


def _compiled(
    x: Tensor,
    dims: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    center: bool,
    valid: Tensor | None,
    act: str | None,
    residual: Tensor | None,
) -> Any:
    """By the kernel of rows: the normalized axes are moved to the end, and back into the input's layout."""
    trailing = tuple(range(x.dim() - len(dims), x.dim()))
    moved = dims != trailing
    mask = None
    if valid is not None:
        mask = valid.squeeze(dims).expand([s for d, s in enumerate(x.shape) if d not in dims]).reshape(-1)
    if moved:
        x = x.movedim(dims, trailing)
        residual = None if residual is None else residual.movedim(dims, trailing)
    dense = x.is_contiguous()
    y, total = compiled.rows(
        x.contiguous(),
        None if residual is None else residual.contiguous(),
        weight,
        bias,
        mask,
        math.prod(x.shape[d] for d in trailing),
        eps,
        center,
        act,
    )
    if moved:
        y, total = (t.movedim(trailing, dims) for t in (y, total))
        if not dense:
            y, total = y.contiguous(), total.contiguous()
    return y if residual is None else (y, total)


def as_autocast(x: Tensor) -> Tensor:
    """On the devices where autocast runs layer_norm, group_norm and rms_norm in float32, so do we."""
    kind = x.device.type
    if kind in ("cuda", "xpu") and torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return x.float()
    return x


def _spread(t: Tensor | None, x: Tensor, dims: tuple[int, ...]) -> Tensor | None:
    """`t`, whose axes are the axes `dims` of `x`, with an axis of size 1 for each other axis of `x`."""
    if t is None:
        return None
    order = sorted(range(len(dims)), key=dims.__getitem__)
    shape = [x.shape[d] if d in dims else 1 for d in range(x.dim())]
    return t.permute(order).reshape(shape)
