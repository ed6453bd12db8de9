"""Normalization by the statistics of all that was seen so far, or of each instance, and its inverse."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normwise.backends.protocol import Moments
from normwise.backends.reference import combined, moments
from normwise.ops import conversion, inputs, validity
from normwise.ops.distributed import pool_moments
from normwise.ops.errors import ShapeError
from normwise.ops.norm.running_stats import is_recomputing


class Scale(NamedTuple):
    """What `x` is normalized by, (x - mean) / deviation, and comes back by; in float64, broadcastable to `x`."""

    mean: Tensor
    deviation: Tensor


# The deviation of a constant is what rounding leaves of it, by the dtype of the moments: a small share of the mean.
_ROUNDING = {torch.float32: 1e-7, torch.float64: 1e-12}


def deviation_of(mean: Tensor, var: Tensor, eps: float) -> Tensor:
    """sqrt(var + eps), and 1 for a constant: it has no scale, and what comes back must not be crushed to it."""
    deviation = (var + eps).sqrt()
    return torch.where(deviation > _ROUNDING[var.dtype] * mean.abs(), deviation, torch.ones_like(deviation))


def valid_elements(x: Tensor, shape: tuple[int, ...], mask: Any, lengths: Any) -> Tensor | None:
    """The valid elements of (..., *shape), as bool with as many axes as `x`; None if all are.

    Args:
        mask: bool, True = valid, of the shape of `x` without `shape`, or broadcastable to that of `x`.
        lengths: (N,) integers, valid steps of (N, T, ..., *shape).

    Raises:
        ShapeError: `x` does not end in `shape`, or mask or lengths do not fit it. TypeError: dtypes that do not.
    """
    inputs.floating("running_norm", x)
    leading = x.dim() - len(shape)
    if leading < 0 or x.shape[leading:] != shape:
        raise ShapeError(
            f"expected an input of shape (*, {', '.join(map(str, shape))}), but got {tuple(x.shape)}: it must end in "
            "the shape that the norm was made for"
        )
    if mask is not None and lengths is not None:
        raise ValueError("got both mask and lengths: give one of them (mask & lengths_mask is a mask)")
    if lengths is not None:
        if leading < 2:
            raise ShapeError(f"lengths counts the steps of (N, T, ...), but got {tuple(x.shape)}: give mask=")
        counts = validity.one_length_each(lengths, x.shape[0], x.shape[1], f"an input of shape {tuple(x.shape)}")
        flags = torch.arange(x.shape[1], device=x.device) < counts.to(x.device, non_blocking=True)[:, None]
        return flags.view(*flags.shape, *(1,) * (x.dim() - 2))
    if mask is None:
        return None
    flags = conversion.mask_tensor(mask, x.device)
    if flags.shape == x.shape[:leading]:
        return flags.view(*flags.shape, *(1,) * len(shape))
    padded = (1,) * (x.dim() - flags.dim()) + tuple(flags.shape)
    if len(padded) != x.dim() or any(m not in (1, s) for m, s in zip(padded, x.shape, strict=True)):
        raise ShapeError(
            f"mask of shape {tuple(flags.shape)} does not fit an input of shape {tuple(x.shape)}: expected "
            f"{tuple(x.shape[:leading])} or a shape that broadcasts to the input's"
        )
    return flags.reshape(padded)


def see(seen: Moments, x: Tensor, valid: Tensor | None, across_ranks: bool, process_group: Any) -> None:
    """Add what is valid of (..., *shape) to the moments `seen`, (*shape) float64, in place; nothing of a batch in which
    a mean or variance is NaN or infinite.

    The moments are those of all elements together, as if they had come at once: see `combined`.
    """
    dims = tuple(range(x.dim() - seen.mean.dim()))
    with torch.no_grad():
        if not dims:  # one observation: torch takes no axes for all of them
            x, valid, dims = x[None], None if valid is None else valid[None], (0,)
        batch = moments(x.detach().to(seen.mean.dtype), dims, valid)
        batch = Moments(*(t.expand_as(batch.mean).reshape(seen.mean.shape) for t in batch))
        if across_ranks:
            batch = Moments(*(t.to(seen.mean.dtype) for t in pool_moments([batch], process_group)[0]))
        both = combined(Moments(*(torch.stack(pair) for pair in zip(seen, batch, strict=True))))
        finite = torch.linalg.vector_norm(torch.stack([both.mean, both.var]).flatten(), math.inf) < math.inf
        for old, new in zip(seen, both, strict=True):
            old.copy_(torch.where(finite & (both.count > 0), new, old))


def scale_of(mean: Tensor, var: Tensor, eps: float, center: bool) -> Scale:
    """The `Scale` of these moments; without `center` the mean stays in."""
    return Scale(mean if center else torch.zeros_like(mean), deviation_of(mean, var, eps))


def running_norm(
    x: Tensor,
    shape: tuple[int, ...],
    seen: Moments | None,
    update: bool,
    *,
    mask: Any,
    lengths: Any,
    affine: tuple[Tensor, Tensor] | None,
    eps: float,
    center: bool,
    clip: float | None,
    across_ranks: bool,
    process_group: Any,
) -> tuple[Tensor, Scale]:
    """(..., *shape) by the moments `seen`, which it first enters where `update` says so; where there are none,
    (N, *steps, *shape), each of the N by its own mean and deviation over its steps. And what it was normalized by."""
    valid = valid_elements(x, shape, mask, lengths)
    if seen is None:
        scale = _scale_of_instances(x, shape, valid, eps, center)
    else:
        if update and not is_recomputing():
            see(seen, x, valid, across_ranks, process_group)
        scale = scale_of(seen.mean, seen.var, eps, center)
    return _standardized(x, scale, valid, affine, clip), scale


def _scale_of_instances(x: Tensor, shape: tuple[int, ...], valid: Tensor | None, eps: float, center: bool) -> Scale:
    steps = tuple(range(1, x.dim() - len(shape)))
    if not steps:
        raise ShapeError(
            f"expected time series of shape (N, T, {', '.join(map(str, shape))}), but got {tuple(x.shape)}: "
            "per_instance=True takes mean and deviation over the steps"
        )
    with torch.no_grad():
        found = moments(x.detach().to(_widest(x.device)), steps, valid)
        return scale_of(found.mean, found.var, eps, center)


def _widest(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def _standardized(
    x: Tensor, scale: Scale, valid: Tensor | None, affine: tuple[Tensor, Tensor] | None, clip: float | None
) -> Tensor:
    """(x - mean) / deviation within +-clip, then gain and bias, 0 where invalid; like `x`."""
    if valid is not None:
        x = x.masked_fill(~valid, 0)
    y = (x.to(scale.mean.dtype) - scale.mean) / scale.deviation
    if clip is not None:
        y = y.clamp(-clip, clip)
    if affine is not None:
        y = y * affine[0] + affine[1]
    return (y if valid is None else y.masked_fill(~valid, 0)).to(x.dtype)


def inverse(y: Tensor, scale: Scale, affine: tuple[Tensor, Tensor] | None, shift: bool) -> Tensor:
    """(y - bias) / gain * deviation + mean, like `y`; without `shift` neither bias nor mean."""
    wide = y.to(scale.mean.dtype)
    if affine is not None:
        wide = (wide - affine[1] if shift else wide) / affine[0]
    wide = wide * scale.deviation
    return (wide + scale.mean if shift else wide).to(y.dtype)
