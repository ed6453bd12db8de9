"""Ghost batch normalization: statistics of virtual batches, running averages of the whole one."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from normwise.backends.activations import add_residual_and_activate
from normwise.backends.protocol import Moments, NormRequest, accumulation_dtype
from normwise.backends.reference import combined
from normwise.ops import inputs, validity
from normwise.ops.dispatch import values_visible
from normwise.ops.norm import running_stats
from normwise.ops.norm.run import run
from normwise.ops.norm.running_stats import Updated


def ghost_batch_norm(request: NormRequest, virtual_batch_size: int, correction: int = 1) -> tuple[Tensor, Updated]:
    """A request of `batch_norm` in training, each run of `virtual_batch_size` samples by its own statistics, and
    whether the running statistics were updated.

    The last virtual batch is smaller where the batch size is no multiple, and joined to the one before where it would
    hold a single value per channel. The running averages are updated by the moments of the whole batch, pooled exactly,
    as in `batch_norm`. (Hoffer et al. update them once per virtual batch, which leaves out the variance between virtual
    batches.) A virtual batch without a valid element is all 0 and does not count.

    Raises what `batch_norm` raises, for each virtual batch.

    Source: Hoffer, Hubara & Soudry 2017, algorithm 1.
    """
    x, valid = request.x, request.mask
    samples = x.shape[0]
    whole, rest = divmod(samples, virtual_batch_size)
    if rest and rest * prod(x.shape[2:]) == 1:
        whole, rest = whole - 1, rest + virtual_batch_size
    if whole + (rest > 0) <= 1:
        result = run(request)
        return result.y, result.stats_updated  # type: ignore[return-value]
    if valid is not None:
        valid = valid.expand(samples, *valid.shape[1:])
    cut = whole * virtual_batch_size
    pieces = [
        _virtual_batches(request, x[rows], None if valid is None else valid[rows], ghosts, virtual_batch_size)
        for rows, ghosts in ((slice(0, cut), whole), (slice(cut, None), 1))
        if x[rows].shape[0]
    ]
    y = pieces[0][0] if len(pieces) == 1 else torch.cat([piece[0] for piece in pieces])
    y = add_residual_and_activate(y, request.residual, request.config.act, valid)
    if request.running_mean is None or request.running_var is None:
        return y, True
    parts = pieces[0][1]
    if len(pieces) > 1:
        parts = Moments(*(torch.cat(column) for column in zip(*(piece[1] for piece in pieces), strict=True)))
    stats = (request.running_mean, request.running_var, request.num_batches_tracked)
    return y, running_stats.update_from_moments(request.config, *stats, combined(parts), correction)


def _virtual_batches(
    request: NormRequest, x: Tensor, valid: Tensor | None, ghosts: int, virtual_batch_size: int
) -> tuple[Tensor, Moments]:
    """The norm of `ghosts` virtual batches of equal size, and their moments (ghosts, C)."""
    samples, channels, *positions = x.shape
    size = samples // ghosts
    counts = _counts(x, valid, ghosts)
    one_value = size * prod(positions) == 1 if valid is None else values_visible(counts) and bool((counts == 1).any())
    if one_value:
        validity.more_than_one(
            1,
            request.x,
            f"That is all that a virtual batch has here, of virtual_batch_size={virtual_batch_size}: make it larger, "
            "or None for the whole batch. Other ways out: a norm that needs no batch (LayerNorm, GroupNorm), or eval "
            "mode",
        )

    # A channel of a virtual batch is a channel of a batch of this size, so any kernel of batch norm does.
    def fold(t: Tensor) -> Tensor:
        return t.reshape(ghosts, size, *t.shape[1:]).transpose(0, 1).reshape(size, -1, *positions)

    folded = None if valid is None else fold(valid.expand(samples, channels, *positions))
    wide = accumulation_dtype(x.dtype)
    gain, shift = (None if t is None else t.to(wide).repeat(ghosts) for t in (request.weight, request.bias))
    # Averages that a momentum of 1 replaces by the moments themselves.
    mean, var = (torch.zeros(ghosts * channels, dtype=wide, device=x.device) for _ in range(2))
    config = request.config._replace(momentum=1.0, act=None)
    result = run(NormRequest(config, inputs.dense(fold(x)), None, gain, shift, folded, mean, var))
    y = result.y.reshape(size, ghosts, channels, *positions).transpose(0, 1).reshape(x.shape)
    if isinstance(result.stats_updated, Tensor):
        mean = torch.where(result.stats_updated, mean, torch.nan)
    elif not result.stats_updated:
        mean = torch.full_like(mean, torch.nan)
    mean = mean.view(ghosts, channels)
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
