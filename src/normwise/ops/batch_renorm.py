"""Batch renormalization: batch normalization whose gain and bias carry the correction towards running averages."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from normwise.ops import check, ragged
from normwise.ops.batch_norm import applied, checked, enough_values
from normwise.ops.running import Moved
from normwise.reference import Moments, accumulation_dtype, moments, renorm_correction

# From the batch's moments, (C,) each, to r and d.
Correction: TypeAlias = Callable[[Moments], tuple[Tensor, Tensor]]


def batch_renorm_moved(
    input: Tensor | PackedSequence,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float | Tensor,
    eps: float,
    correction: Correction,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    act: str | None = None,
    residual: Tensor | PackedSequence | None = None,
) -> tuple[Tensor | PackedSequence, Moved]:
    """act(gamma * ((x - mean_B) / sigma_B * r + d) + beta + residual) in training, and whether the averages moved.

    (r, d) = correction(moments of the batch) is taken before the running averages move, and no gradient flows through
    it. All else is as in `normwise.functional.batch_norm`, but that one value a channel is allowed: it standardizes to
    0, so d alone is left, which is where it stands to the running averages.

    Source: Ioffe 2017, algorithm 1.
    """
    if ragged.is_ragged(input):
        moved: Moved = True

        def rows(x: Tensor, residual: Tensor | None) -> Tensor:
            nonlocal moved
            y, moved = batch_renorm_moved(
                x, running_mean, running_var, weight, bias, momentum, eps, correction, act=act, residual=residual
            )
            assert isinstance(y, Tensor)
            return y

        return ragged.by_rows(rows, input, mask=mask, lengths=lengths, residual=residual), moved
    x = check.tensor("batch_renorm", input)
    valid = checked(
        "batch_renorm", x, running_mean, running_var, weight, bias, momentum, eps, mask, lengths, act, residual
    )
    assert residual is None or isinstance(residual, Tensor)
    enough_values(x, valid, needed=1)
    averages = (running_mean, running_var) if x.numel() else None
    r, d = correction(_moments(x, valid))
    # With gain gamma * r and bias gamma * d + beta it is a batch norm, which all its kernels compute in one go.
    wide = accumulation_dtype(x.dtype)
    gain = r if weight is None else r * weight.to(wide)
    shift = d if weight is None else d * weight.to(wide)
    if bias is not None:
        shift = shift + bias.to(wide)
    return applied(x, averages, gain, shift, True, momentum, eps, valid, act, residual)


def _moments(x: Tensor, valid: Tensor | None) -> Moments:
    """Of each channel, as vectors."""
    dims = (0, *range(2, x.dim()))
    with torch.no_grad():
        if valid is not None or x.numel() == 0:
            found = moments(x, dims, valid)
            return Moments(*(m.expand_as(found.mean).reshape(-1) for m in found))
        var, mean = torch.var_mean(x.to(accumulation_dtype(x.dtype)), dims, correction=0)
        return Moments(mean, var, torch.full_like(mean, x.numel() // x.shape[1]))


def corrected(
    batch: Moments,
    running_mean: Tensor,
    running_var: Tensor,
    r_max: float | Tensor,
    d_max: float | Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """`normwise.reference.renorm_correction`, as one node while compiling."""
    if not torch.compiler.is_compiling():
        return renorm_correction(batch, running_mean, running_var, r_max, d_max, eps)
    limits = [torch.as_tensor(limit, dtype=batch.mean.dtype, device=batch.mean.device) for limit in (r_max, d_max)]
    with torch.no_grad():
        return _renorm_correction(  # type: ignore[no-any-return]
            batch.mean, batch.var, running_mean, running_var, *limits, eps
        )


# A compiled backward may compute again what is cheap; r and d would then come from averages that have moved. The
# result of an op that the compiler does not know is kept.
@torch.library.custom_op("normwise::renorm_correction", mutates_args=())
def _renorm_correction(
    batch_mean: Tensor,
    batch_var: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    r_max: Tensor,
    d_max: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    batch = Moments(batch_mean, batch_var, torch.ones_like(batch_mean))
    return renorm_correction(batch, running_mean, running_var, r_max, d_max, eps)


@_renorm_correction.register_fake
def _(
    batch_mean: Tensor,
    batch_var: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    r_max: Tensor,
    d_max: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(batch_mean), torch.empty_like(batch_var)
