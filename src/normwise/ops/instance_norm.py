"""Instance normalization: one mean and variance for each sample and channel."""

from __future__ import annotations

from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from normwise.ops import check, compiled, ragged, running, symbolic
from normwise.ops.batch_norm import applied
from normwise.ops.choose import Call, choose, long_gain_sums, loses_digits, watches_digits
from normwise.ops.norm import finished, laid_out_like, norm, times_gain
from normwise.reference import Moments, activation, count_valid


def instance_norm(
    input: Tensor | PackedSequence,
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
    act: str | None = None,
    residual: Tensor | PackedSequence | None = None,
) -> Any:
    r"""act(gamma * (x - mean) / sqrt(var + eps) + beta + residual), statistics over positions, by sample and channel.

    Args:
        input: (N, C, ...) with at least one axis of positions; or a PackedSequence or jagged nested tensor of N
            sequences of rows of C channels.
        running_mean, running_var: (C,), moved in place towards the average over samples if `use_input_stats`,
            otherwise the statistics that are used.
        weight, bias: (C,): gamma and beta.
        use_input_stats: take the statistics from the input.
        momentum: weight of the new batch in the running averages, in [0, 1].
        eps: added to the (biased) variance.
        mask: bool, True = valid: (N, ...), the input without its channel axis, or broadcastable to the input.
        lengths: (N,) integers, valid steps along the last axis of (N, C, ..., L).
        act: "relu", "leaky_relu", "silu" or "gelu", applied last.
        residual: like the input, added before `act`.

    Returns:
        Like the input; 0 at invalid positions, which neither enter the statistics nor receive a gradient. A sample
        without a valid element is all 0; one with a single valid element gives its bias there.

    Raises:
        ValueError: one position only, eps <= 0, momentum outside [0, 1], running averages missing.
        ShapeError: shapes that do not fit. TypeError: dtypes that do not.

    Source: Ulyanov, Vedaldi & Lempitsky 2016, eq. 2.
    """
    if symbolic.is_traced(input, weight, mask, lengths, residual):
        return symbolic.call_function(
            instance_norm,
            input,
            running_mean,
            running_var,
            weight,
            bias,
            use_input_stats,
            momentum,
            eps,
            mask=mask,
            lengths=lengths,
            act=act,
            residual=residual,
        )
    if ragged.is_ragged(input):
        sequences = partial(
            instance_norm,
            running_mean=running_mean,
            running_var=running_var,
            weight=weight,
            bias=bias,
            use_input_stats=use_input_stats,
            momentum=momentum,
            eps=eps,
            act=act,
        )
        return ragged.by_sequences(sequences, input, mask=mask, lengths=lengths, residual=residual)
    x = check.tensor("instance_norm", input)
    check.floating("instance_norm", x)
    check.positive_eps(eps)
    check.momentum_range(momentum)
    if x.dim() < 3:
        raise check.ShapeError(
            f"expected 3D input or more (got {x.dim()}D input): (N, C, ...) with an axis of positions"
        )
    channels, *positions = x.shape[1:]
    check.channel_vectors(channels, running_mean, running_var, weight, bias)
    check.same_shape("residual", residual, x)
    check.beside(
        x,
        mask=mask,
        residual=residual,
        weight=weight,
        bias=bias,
        running_mean=running_mean,
        running_var=running_var,
    )
    assert residual is None or isinstance(residual, Tensor)
    if act is not None:
        activation(act)
    valid = check.validity(x, mask, lengths, channel_dim=1)
    averages = None if running_mean is None or running_var is None else (running_mean, running_var)
    if not use_input_stats:
        if averages is None:
            raise ValueError(
                "Expected running_mean and running_var to be defined when use_input_stats is false: give them, or "
                "take the "
                "input's own statistics"
            )
        return applied(x, averages, weight, bias, False, momentum, eps, valid, act, residual)[0]
    if prod(positions) == 1:
        raise ValueError(
            f"Expected more than 1 spatial element when training, got input size {x.shape}: one value standardizes "
            "to 0 "
            "whatever it is. Use LayerNorm or GroupNorm, whose statistics also run over channels"
        )

    dims = tuple(range(2, x.dim()))
    call = Call("instance_norm", x, dims, weight=weight, bias=bias, mask=valid, residual=residual, averages=averages)
    if choose(call).backend == "cpu":
        return _compiled(call, momentum, eps, act)
    y = _standardized(call._replace(residual=None), momentum, eps)
    return laid_out_like(finished(y, residual, act, valid), x)


def _compiled(call: Call, momentum: float, eps: float, act: str | None) -> Tensor:
    """By the kernel of groups, every channel a group of its own; it says what the running averages move towards."""
    samples, channels = call.x.shape[:2]
    y, stats = compiled.groups(call, channels, eps, act)
    if call.averages is not None and samples:
        mean, rstd = stats.view(2, samples, channels)
        counted = count_valid(call.x, call.dims, call.mask).to(torch.float64).flatten(1).expand(samples, channels)
        moments = Moments(mean, (rstd.pow(-2) - eps).clamp(min=0), counted)
        running.move_over_samples(*call.averages, moments, momentum)
    return y


def _standardized(call: Call, momentum: float, eps: float) -> Tensor:
    """gamma * (x - mean) / sqrt(var + eps) + beta by the chosen backend; moves the running averages, if any."""
    x, weight, bias, averages = call.x, call.weight, call.bias, call.averages
    samples, channels, *positions = x.shape
    per_channel = (1, channels, *(1,) * len(positions))
    backend = choose(call).backend
    if backend == "cpu":
        return _compiled(call, momentum, eps, None)
    if backend == "torch":
        mean, var = averages or (None, None)
        if not watches_digits(x):
            cudnn = torch.backends.cudnn.enabled
            return torch.instance_norm(x, weight, bias, mean, var, True, momentum, eps, cudnn)
        if averages is None:
            # ATen's own way: every sample's channels are channels of one large sample.
            folded = x.reshape(1, samples * channels, *positions)
            apart = long_gain_sums(x, weight, prod(positions))
            gain, shift = (None if t is None or apart else t.repeat(samples) for t in (weight, bias))
            y, *used = torch.native_batch_norm(folded, gain, shift, None, None, True, momentum, eps)
            if not loses_digits(*used):
                y = y.reshape(x.shape)
                return times_gain(y, weight, bias, per_channel) if apart else y
    gain, shift = (None if t is None else t.view(per_channel) for t in (weight, bias))
    y, moments = norm(x, call.dims, gain, shift, mask=call.mask, eps=eps)
    if averages is not None and samples:
        running.move_over_samples(*averages, moments, momentum)
    return y
