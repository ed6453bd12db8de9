"""Batch renormalization: a batch's own statistics, corrected towards running averages."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from normwise.backends.protocol import Moments
from normwise.backends.reference.norm import norm


def renorm_correction(
    moments: Moments, mean: Tensor, var: Tensor, r_max: float | Tensor, d_max: float | Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(r, d), constants for the gradient, that turn (x - mean_B) / sigma_B into about (x - mean) / sigma.

        r = clip(sigma_B / sigma, 1 / r_max, r_max), d = clip((mean_B - mean) / sigma, -d_max, d_max)

    with sigma = sqrt(var + eps), of the batch (B) and of the running averages. Without clips, r z + d is exactly
    (x - mean) / sigma; with r_max = 1 and d_max = 0 it is z.

    Args:
        moments: of the batch.
        mean, var: running averages, broadcastable against the moments.
        r_max, d_max: at least 1 and 0.
        eps: added to both variances.

    Source: Ioffe 2017, algorithm 1.
    """
    with torch.no_grad():
        wide = moments.mean.dtype
        sigma = torch.sqrt(var.to(wide) + eps)
        r = torch.sqrt(moments.var + eps) / sigma
        d = (moments.mean - mean.to(wide)) / sigma
        # Numbers stay numbers: on a GPU each would be copied there, with a wait.
        r_most, d_most = (most.to(wide) if isinstance(most, Tensor) else most for most in (r_max, d_max))
        return r.clamp(1 / r_most, r_most), d.clamp(-d_most, d_most)  # type: ignore[arg-type]


def batch_renorm(
    x: Tensor,
    dims: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    mean: Tensor,
    var: Tensor,
    r_max: float | Tensor,
    d_max: float | Tensor,
    eps: float,
) -> tuple[Tensor, Moments]:
    """y = weight * ((x - mean_B) / sigma_B * r + d) + bias, and 0 where `mask` is False; with the batch's moments.

    `mean` and `var` are the running averages; the other arguments are those of `norm` and `renorm_correction`.
    """
    z, moments = norm(x.to(torch.promote_types(x.dtype, mean.dtype)), dims, mask=mask, eps=eps)
    r, d = renorm_correction(moments, mean, var, r_max, d_max, eps)
    y = z * r + d
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    if mask is not None:
        y = y.masked_fill(~mask, 0)
    return y.to(x.dtype), moments
