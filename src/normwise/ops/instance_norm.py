"""Instance normalization: one mean and variance for each sample and channel."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from normwise.ops import check, compiled, running
from normwise.ops.batch_norm import standardized
from normwise.ops.choose import Call, choose, loses_digits, watches_digits
from normwise.ops.norm import norm


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    r"""gamma * (x - mean) / sqrt(var + eps) + beta, statistics over the positions of one sample and channel.

    Args:
        input: (N, C, ...) with at least one axis of positions.
        running_mean, running_var: (C,), moved in place towards the average over samples if `use_input_stats`,
            otherwise the statistics that are used.
        weight, bias: (C,).
        use_input_stats: take the statistics from the input.
        momentum: weight of the new batch in the running averages, in [0, 1].
        eps: added to the (biased) variance.
        mask: bool, True = valid: (N, ...), the input without its channel axis, or broadcastable to the input.
        lengths: (N,) integers, valid steps along the last axis of (N, C, ..., L).

    Returns:
        Like the input; 0 at invalid positions, which neither enter the statistics nor receive a gradient. A sample
        without a valid element is all 0; one with a single valid element gives its bias there.

    Raises:
        ValueError: one position only, eps <= 0, momentum outside [0, 1], running averages missing.
        ShapeError: shapes that do not fit. TypeError: dtypes that do not.

    Source: Ulyanov, Vedaldi & Lempitsky 2016, eq. 2.
    """
    x = input
    check.floating("instance_norm", x)
    check.positive_eps(eps)
    check.momentum_range(momentum)
    if x.dim() < 3:
        raise check.ShapeError(
            f"expected 3D input or more (got {x.dim()}D input): (N, C, ...) with an axis of positions"
        )
    samples, channels, *positions = x.shape
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var go together: give both or neither")
    for name, value in (
        ("running_mean", running_mean),
        ("running_var", running_var),
        ("weight", weight),
        ("bias", bias),
    ):
        check.per_channel(name, value, channels)
    valid = check.validity(x, mask, lengths, channel_dim=1)
    averages = None if running_mean is None or running_var is None else (running_mean, running_var)
    if not use_input_stats:
        if averages is None:
            raise ValueError(
                "Expected running_mean and running_var to be defined when use_input_stats is false: give them, or "
                "take the "
                "input's own statistics"
            )
        return standardized(x, averages, weight, bias, False, momentum, eps, valid)[0]
    if prod(positions) == 1:
        raise ValueError(
            f"Expected more than 1 spatial element when training, got input size {x.shape}: one value standardizes "
            "to 0 "
            "whatever it is. Use LayerNorm or GroupNorm, whose statistics also run over channels"
        )

    call = Call("instance_norm", x, tuple(range(2, x.dim())), weight=weight, mask=valid, averages=averages)
    backend = choose(call).backend
    if backend == "cpu":
        rows = None if valid is None else valid.squeeze(1).expand(samples, *positions).reshape(samples, -1)
        return compiled.groups(x.contiguous(), weight, bias, rows, channels, eps)
    if backend == "torch":
        if not watches_digits(x):
            return torch.instance_norm(
                x,
                weight,
                bias,
                running_mean,
                running_var,
                True,
                momentum,
                eps,
                torch.backends.cudnn.enabled,
            )
        if averages is None:
            # ATen's own way: every sample's channels are channels of one large sample.
            folded = x.reshape(1, samples * channels, *positions)
            gain, shift = (None if t is None else t.repeat(samples) for t in (weight, bias))
            y, mean, rstd = torch.native_batch_norm(folded, gain, shift, None, None, True, momentum, eps)
            if not loses_digits(mean, rstd):
                return y.reshape(x.shape)
    per_channel = (1, channels, *(1,) * len(positions))
    gain, shift = (None if t is None else t.view(per_channel) for t in (weight, bias))
    y, moments = norm(x, call.dims, gain, shift, mask=valid, eps=eps)
    if averages is not None and samples:
        running.move_over_samples(*averages, moments, momentum)
    return y
