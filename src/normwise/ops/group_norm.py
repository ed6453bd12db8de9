"""Group normalization: one mean and variance for each sample and group of channels."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from normwise.ops import check, compiled
from normwise.ops.choose import Call, choose, loses_digits, watches_digits
from normwise.ops.features import as_autocast
from normwise.ops.norm import norm


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    r"""gamma * (x - mean) / sqrt(var + eps) + beta, statistics over a group of channels and all positions of a sample.

    Args:
        input: (N, C, ...).
        num_groups: into how many groups of neighbouring channels C is divided.
        weight, bias: (C,).
        eps: added to the (biased) variance.
        mask: bool, True = valid: (N, ...), the input without its channel axis, or broadcastable to the input.
        lengths: (N,) integers, valid steps along the last axis of (N, C, ..., L).

    Returns:
        Like the input; 0 at invalid positions, which neither enter the statistics nor receive a gradient. A sample
        without a valid element is all 0.

    Raises:
        ValueError: groups that do not divide C, one value per group in the whole batch, eps <= 0.
        ShapeError: shapes that do not fit. TypeError: dtypes that do not.

    Source: Wu & He 2018, eq. 7.
    """
    x = input
    check.floating("group_norm", x)
    check.positive_eps(eps)
    if x.dim() < 2:
        raise check.ShapeError(
            f"Expected at least 2 dimensions for input tensor but received {x.dim()}: axis 1 must hold the channels"
        )
    samples, channels, *positions = x.shape
    groups_divide(num_groups, channels)
    check.per_channel("weight", weight, channels)
    check.per_channel("bias", bias, channels)
    valid = check.validity(x, mask, lengths, channel_dim=1)
    check.more_than_one(
        samples * channels // num_groups * prod(positions),
        x,
        "Use fewer groups, so that each holds several channels, or LayerNorm.",
    )

    call = Call("group_norm", x, tuple(range(2, x.dim() + 1)), weight=weight, mask=valid)
    backend = choose(call).backend
    if backend == "cpu":
        rows = None if valid is None else valid.squeeze(1).expand(samples, *positions).reshape(samples, -1)
        return compiled.groups(x.contiguous(), weight, bias, rows, num_groups, eps)
    if backend == "torch":
        if not watches_digits(x):
            return torch.group_norm(x, num_groups, weight, bias, eps, torch.backends.cudnn.enabled)
        y, mean, rstd = torch.native_group_norm(
            _dense(x), weight, bias, samples, channels, prod(positions), num_groups, eps
        )
        if not loses_digits(mean, rstd):
            return y
    grouped = (num_groups, channels // num_groups)
    per_channel = (1, *grouped, *(1,) * len(positions))
    y, _ = norm(
        as_autocast(x).unflatten(1, grouped),
        call.dims,
        None if weight is None else weight.view(per_channel),
        None if bias is None else bias.view(per_channel),
        mask=None if valid is None else valid.unflatten(1, grouped if valid.shape[1] > 1 else (1, 1)),
        eps=eps,
    )
    return y.flatten(1, 2)


def _dense(x: Tensor) -> Tensor:
    """`x` in a layout that ATen's kernel can walk through: contiguous or channels-last."""
    channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if channels_last is not None and x.is_contiguous(memory_format=channels_last):
        return x
    return x.contiguous()


def groups_divide(num_groups: int, channels: int) -> None:
    """ValueError unless `channels` fall into `num_groups` equal groups."""
    if num_groups <= 0 or channels % num_groups != 0:
        fitting = [g for g in range(1, channels + 1) if channels % g == 0]
        raise ValueError(
            f"num_channels ({channels}) must be divisible by num_groups ({num_groups}): num_groups can be one of "
            f"{fitting}"
        )
