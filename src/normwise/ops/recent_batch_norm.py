"""Batch normalization by the statistics of this micro-batch and of the last ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from normwise.ops import ragged, running
from normwise.ops.batch_norm import checked, enough_values
from normwise.ops.norm import finished
from normwise.ops.running import Moved
from normwise.reference import Moments, combined, moments, norm


def recent_batch_norm_moved(
    input: Any,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float | Tensor,
    eps: float,
    earlier: Callable[[Moments], Sequence[Moments]],
    *,
    first: bool,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    act: str | None = None,
    residual: Any = None,
) -> tuple[Any, Moved]:
    """Training's `batch_norm` by the count-weighted moments of this batch and of those that `earlier` gives for it.

    The gradient flows through this batch's share of the statistics; the earlier ones are constants. The running
    averages move by the pooled moments.

    Args:
        earlier: takes this batch's moments, (C,) each and detached, and returns earlier ones of that shape.
        first: there are no earlier ones, so that this batch needs two values a channel.
    """
    if ragged.is_ragged(input):
        moved: Moved = True

        def rows(x: Tensor, residual: Tensor | None) -> Tensor:
            nonlocal moved
            y: Tensor
            y, moved = recent_batch_norm_moved(
                x,
                running_mean,
                running_var,
                weight,
                bias,
                momentum,
                eps,
                earlier,
                first=first,
                act=act,
                residual=residual,
            )
            return y

        return ragged.by_rows(rows, input, mask=mask, lengths=lengths, residual=residual), moved
    x: Tensor = input
    valid = checked(
        "batch_norm", x, running_mean, running_var, weight, bias, momentum, eps, mask, lengths, act, residual
    )
    enough_values(x, valid, needed=2 if first else 1)
    dims = (0, *range(2, x.dim()))
    found = moments(x, dims, valid)
    own = Moments(*(m.expand_as(found.mean).reshape(-1) for m in found))
    parts = [own, *earlier(Moments(*(m.detach() for m in own)))]
    pooled = combined(Moments(*(torch.stack(column) for column in zip(*parts, strict=True))))
    shape = (1, -1, *(1,) * (x.dim() - 2))
    gain, shift = (None if t is None else t.view(shape) for t in (weight, bias))
    y, _ = norm(x, dims, gain, shift, mask=valid, mean=pooled.mean.view(shape), var=pooled.var.view(shape), eps=eps)
    y = finished(y, residual, act, valid)
    if running_mean is None or running_var is None or x.numel() == 0:
        return y, True
    return y, running.move(running_mean, running_var, Moments(*(m.detach() for m in pooled)), momentum)
