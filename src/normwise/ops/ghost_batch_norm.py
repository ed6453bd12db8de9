"""Ghost batch normalization: statistics of virtual batches, running averages of the whole one."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from normwise.ops import check, running
from normwise.ops.batch_norm import applied, checked, enough_values
from normwise.ops.choose import values_visible
from normwise.ops.norm import finished
from normwise.ops.running import Moved
from normwise.reference import Moments, accumulation_dtype, combined


def ghost_batch_norm_moved(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float | Tensor,
    eps: float,
    virtual_batch_size: int,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    act: str | None = None,
    residual: Tensor | None = None,
) -> tuple[Tensor, Moved]:
    """Training's `batch_norm`, each run of `virtual_batch_size` samples by its own statistics; whether averages moved.

    The last virtual batch is smaller where the batch size is no multiple, and joined to the one before where it would
    hold a single value a channel. The running averages move by the moments of the whole batch, pooled exactly: they are
    those of `batch_norm`. (Hoffer et al. move them once a virtual batch, whose variances leave out how far the virtual
    batches lie apart.) A virtual batch without a valid element is all 0 and does not count.

    Raises what `batch_norm` raises, for each virtual batch.

    Source: Hoffer, Hubara & Soudry 2017, algorithm 1.
    """
    valid = checked(
        "batch_norm", x, running_mean, running_var, weight, bias, momentum, eps, mask, lengths, act, residual
    )
    averages = None if running_mean is None or running_var is None else (running_mean, running_var)
    samples = x.shape[0]
    whole, rest = divmod(samples, virtual_batch_size)
    if rest and rest * prod(x.shape[2:]) == 1:
        whole, rest = whole - 1, rest + virtual_batch_size
    if whole + (rest > 0) <= 1:
        enough_values(x, valid, needed=2)
        return applied(x, averages if samples else None, weight, bias, True, momentum, eps, valid, act, residual)
    wide = accumulation_dtype(x.dtype)
    gain, shift = (None if t is None else t.to(wide) for t in (weight, bias))
    cut = whole * virtual_batch_size
    if valid is not None:
        valid = valid.expand(samples, *valid.shape[1:])
    pieces = [
        _virtual_batches(x[rows], None if valid is None else valid[rows], gain, shift, eps, ghosts)
        for rows, ghosts in ((slice(0, cut), whole), (slice(cut, None), 1))
        if x[rows].shape[0]
    ]
    y = torch.cat([piece[0] for piece in pieces])
    y = finished(y, residual, act, valid)
    if averages is None:
        return y, True
    parts = Moments(*(torch.cat(column) for column in zip(*(piece[1] for piece in pieces), strict=True)))
    return y, running.move(*averages, combined(parts), momentum)


def _virtual_batches(
    x: Tensor, valid: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, ghosts: int
) -> tuple[Tensor, Moments]:
    """The norm of `ghosts` virtual batches of equal size, and their moments (ghosts, C)."""
    samples, channels, *positions = x.shape
    size = samples // ghosts
    counts = _counts(x, valid, ghosts)
    if valid is None:
        enough_values(x[:size], None, needed=2)
    elif values_visible(counts) and bool((counts == 1).any()):
        check.more_than_one(1, x, check.BATCH_OF_ONE_CURE)

    # A channel of a virtual batch is a channel of a batch of this size, so any kernel of batch norm does.
    def fold(t: Tensor) -> Tensor:
        return t.reshape(ghosts, size, *t.shape[1:]).transpose(0, 1).reshape(size, -1, *positions)

    folded = None
    if valid is not None:
        folded = fold(valid.expand(samples, channels, *positions))
    gain, shift = (None if t is None else t.repeat(ghosts) for t in (weight, bias))
    # Averages that a momentum of 1 replaces by the moments themselves.
    wide = accumulation_dtype(x.dtype)
    mean, var = (torch.zeros(ghosts * channels, dtype=wide, device=x.device) for _ in range(2))
    y, moved = applied(fold(x), (mean, var), gain, shift, True, 1.0, eps, folded, None, None)
    y = y.reshape(size, ghosts, channels, *positions).transpose(0, 1).reshape(x.shape)
    finite = torch.as_tensor(moved, device=x.device)
    mean = torch.where(finite, mean, torch.nan).view(ghosts, channels)
    biased = var.view(ghosts, channels) * ((counts - 1).clamp(min=0) / counts.clamp(min=1))
    return y, Moments(mean, biased, counts.expand(ghosts, channels))


def _counts(x: Tensor, valid: Tensor | None, ghosts: int) -> Tensor:
    """How many elements a channel of each virtual batch has: (ghosts, 1 or C)."""
    samples, _, *positions = x.shape
    wide = accumulation_dtype(x.dtype)
    if valid is None:
        return torch.full((ghosts, 1), samples // ghosts * prod(positions), dtype=wide, device=x.device)
    full = valid.expand(samples, valid.shape[1], *positions)
    dims = (1, *range(3, full.dim() + 1))
    return full.reshape(ghosts, samples // ghosts, *full.shape[1:]).sum(dims).to(wide)
