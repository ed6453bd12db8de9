"""Group normalization: one mean and variance for each sample and group of channels."""

from __future__ import annotations

from functools import partial
from math import prod
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from normwise.backends.activations import activation
from normwise.backends.protocol import NormConfig, NormRequest
from normwise.ops import hyperparameters, inputs, ragged, symbolic, validity
from normwise.ops.errors import ShapeError
from normwise.ops.norm.modulation import Given, of_channels
from normwise.ops.norm.run import run


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
    dim: int = 1,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
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
        act: "relu", "leaky_relu", "silu", "gelu", "relu6", "hardswish", "hardsigmoid", "elu", "gelu_tanh", "softplus"
            or "mish", applied last: torch.nn.functional's by their defaults, "gelu_tanh" gelu(approximate="tanh").
        residual: like the input, added before `act`.
        dim: the axis of the channels, e.g. -1 for (N, L, C); mask and residual are laid out as the input.
        scale, shift: (N, C), one for each sample, or of as many axes as the input, to which it broadcasts: the
            normalized input with gain and bias is multiplied by 1 + scale and shift is added, before the residual.

    Returns:
        Like the input; 0 at invalid positions, which neither enter the statistics nor receive a gradient. A sample
        without a valid element is all 0.

    Raises:
        ValueError: groups that do not divide C, one value per group in the whole batch, eps <= 0.
        ShapeError: shapes that do not fit.
        TypeError: dtypes that do not.

    Source: Wu & He 2018, eq. 7.
    """
    given = {"mask": mask, "lengths": lengths, "act": act, "residual": residual, "dim": dim}
    if not (scale is shift is None):
        given |= {"scale": scale, "shift": shift}
    return group_norm_of(input, num_groups, weight, bias, eps, **given)  # type: ignore[arg-type]


def group_norm_of(
    input: Tensor | PackedSequence,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    act: str | None = None,
    residual: Tensor | PackedSequence | None = None,
    num_channels: int | None = None,
    dim: int = 1,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Any:
    """`group_norm` of an input that must have `num_channels` channels, if that is given."""
    modulated = not (scale is shift is None)
    if symbolic.is_traced(input, weight, mask, lengths, residual) or (modulated and symbolic.is_traced(scale, shift)):
        given = {"mask": mask, "lengths": lengths, "act": act, "residual": residual, "dim": None if dim == 1 else dim}
        given |= {"scale": scale, "shift": shift}
        return symbolic.call_function(group_norm, input, num_groups, weight, bias, eps, **given)
    if modulated:
        given = {"mask": mask, "lengths": lengths, "act": act, "residual": residual, "dim": dim}
        return _modulated(input, num_groups, weight, bias, eps, num_channels, Given(scale, shift), **given)
    if dim != 1:
        input, mask, residual = inputs.channels_to_axis_1("group_norm", input, dim, mask, residual)
    if ragged.is_ragged(input):
        sequences = partial(
            group_norm_of,
            num_groups=num_groups,
            weight=weight,
            bias=bias,
            eps=eps,
            act=act,
            num_channels=num_channels,
        )
        return ragged.by_sequences(sequences, input, mask=mask, lengths=lengths, residual=residual)
    x = inputs.tensor("group_norm", input)
    inputs.floating("group_norm", x)
    hyperparameters.positive_eps(eps)
    if x.dim() < 2:
        raise ShapeError(
            f"Expected at least 2 dimensions for input tensor but received {x.dim()}: axis 1 must hold the channels"
        )
    samples, channels, *positions = x.shape
    if num_channels is not None and channels != num_channels:
        raise ShapeError(
            f"expected input's size at dim=1 to match num_channels ({num_channels}), but got: {channels}"
            f"{inputs.channels_last_hint(x, num_channels)}."
        )
    groups_divide(num_groups, channels)
    inputs.per_channel("weight", weight, x)
    inputs.per_channel("bias", bias, x)
    inputs.same_shape("residual", residual, x)
    all_readable = inputs.beside(x, mask=mask, residual=residual, weight=weight, bias=bias)
    assert residual is None or isinstance(residual, Tensor)
    if act is not None:
        activation(act)
    valid = validity.valid_elements(x, mask, lengths, channel_dim=1)
    validity.more_than_one(
        samples * channels // num_groups * prod(positions),
        x,
        "Use fewer groups, so that each holds several channels, or LayerNorm.",
    )
    config = NormConfig("group_norm", "groups", eps, act, groups=num_groups)
    request = NormRequest(config, inputs.dense(x), residual, weight, bias, valid)
    y = run(request, None, all_readable and valid is None).y
    return y if dim == 1 else y.movedim(1, dim)


def _modulated(
    input: Any,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    num_channels: int | None,
    given: Given,
    **options: Any,
) -> Any:
    """`group_norm_of` with scale or shift."""

    def bare(x: Tensor, mask: Tensor | None) -> tuple[Any, None]:
        return group_norm_of(x, num_groups, None, None, eps, mask=mask, num_channels=num_channels), None

    def fused(x: Tensor, samples: int, gain: Tensor | None, bias: Tensor | None, **options: Any) -> Any:
        channels = x.shape[1] // samples
        if num_channels not in (None, channels) or num_groups <= 0 or channels % num_groups:
            return None  # refused by `bare`
        if channels // num_groups * prod(x.shape[2:]) == 1:
            return None  # allowed of several samples only
        return group_norm_of(x, samples * num_groups, gain, bias, eps, **options)

    return of_channels("group_norm", bare, fused, input, weight, bias, given, eps=eps, **options)[0]


def groups_divide(num_groups: int, channels: int) -> None:
    """ValueError unless `channels` fall into `num_groups` equal groups."""
    if num_groups <= 0 or channels % num_groups != 0:
        fitting = [g for g in range(1, channels + 1) if channels % g == 0]
        raise ValueError(
            f"num_channels ({channels}) must be divisible by num_groups ({num_groups}): num_groups can be one of "
            f"{fitting}"
        )
