"""Group normalization: one mean and variance for each sample and group of channels."""

from __future__ import annotations

from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from normwise.ops import check, compiled, ragged, symbolic
from normwise.ops.choose import Call, choose, long_gain_sums, loses_digits, watches_digits
from normwise.ops.features import as_autocast
from normwise.ops.norm import finished, laid_out_like, norm, times_gain
from normwise.reference import activation


def group_norm(
    input: Tensor | PackedSequence,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    act: str | None = None,
    residual: Tensor | PackedSequence | None = None,
) -> Any:
    r"""act(gamma * (x - mean) / sqrt(var + eps) + beta + residual), statistics over a group of channels of a sample.

    Mean and (biased) variance are those of all positions of C / num_groups neighbouring channels of one sample.

    Args:
        input: (N, C, ...); or a PackedSequence or jagged nested tensor of N sequences of rows of C channels.
        num_groups: into how many groups of neighbouring channels C is divided.
        weight, bias: (C,): gamma and beta.
        eps: added to the variance.
        mask: bool, True = valid: (N, ...), the input without its channel axis, or broadcastable to the input.
        lengths: (N,) integers, valid steps along the last axis of (N, C, ..., L).
        act: "relu", "leaky_relu", "silu" or "gelu", applied last.
        residual: like the input, added before `act`.

    Returns:
        Like the input; 0 at invalid positions, which neither enter the statistics nor receive a gradient. A sample
        without a valid element is all 0.

    Raises:
        ValueError: groups that do not divide C, one value per group in the whole batch, eps <= 0.
        ShapeError: shapes that do not fit. TypeError: dtypes that do not.

    Source: Wu & He 2018, eq. 7.
    """
    if symbolic.is_traced(input, weight, mask, lengths, residual):
        return symbolic.call_function(
            group_norm,
            input,
            num_groups,
            weight,
            bias,
            eps,
            mask=mask,
            lengths=lengths,
            act=act,
            residual=residual,
        )
    if ragged.is_ragged(input):
        sequences = partial(group_norm, num_groups=num_groups, weight=weight, bias=bias, eps=eps, act=act)
        return ragged.by_sequences(sequences, input, mask=mask, lengths=lengths, residual=residual)
    x = check.tensor("group_norm", input)
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
    check.same_shape("residual", residual, x)
    check.beside(x, mask=mask, residual=residual, weight=weight, bias=bias)
    assert residual is None or isinstance(residual, Tensor)
    if act is not None:
        activation(act)
    valid = check.validity(x, mask, lengths, channel_dim=1)
    check.more_than_one(
        samples * channels // num_groups * prod(positions),
        x,
        "Use fewer groups, so that each holds several channels, or LayerNorm.",
    )
    dims = tuple(range(2, x.dim() + 1))
    call = Call("group_norm", x, dims, weight=weight, bias=bias, mask=valid, residual=residual)
    if choose(call).backend == "cpu":
        return compiled.groups(call, num_groups, eps, act)[0]
    y = _standardized(call._replace(residual=None), num_groups, eps)
    return laid_out_like(finished(y, residual, act, valid), x)


def _standardized(call: Call, num_groups: int, eps: float) -> Tensor:
    """gamma * (x - mean) / sqrt(var + eps) + beta by the chosen backend."""
    x, weight, bias, valid = call.x, call.weight, call.bias, call.mask
    samples, channels, *positions = x.shape
    backend = choose(call).backend
    if backend == "cpu":
        return compiled.groups(call, num_groups, eps, None)[0]
    if backend == "torch":
        if not watches_digits(x):
            return torch.group_norm(x, num_groups, weight, bias, eps, torch.backends.cudnn.enabled)
        apart = long_gain_sums(x, weight, samples * prod(positions))
        # It reads gain and bias as if they were contiguous.
        gain, shift = (None if t is None or apart else t.contiguous() for t in (weight, bias))
        y, mean, rstd = torch.native_group_norm(
            _dense(x), gain, shift, samples, channels, prod(positions), num_groups, eps
        )
        if not loses_digits(mean, rstd):
            y = y.view(x.shape)
            return times_gain(y, weight, bias, (1, channels, *(1,) * len(positions))) if apart else y
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
    """`x` in a layout that ATen's kernel can walk through: contiguous or channels-last, which it knows of four axes."""
    if x.dim() == 3 and not x.is_contiguous() and x.mT.is_contiguous():
        return x.unsqueeze(2)
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
