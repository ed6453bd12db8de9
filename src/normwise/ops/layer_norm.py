"""Layer normalization: one mean and variance a sample, over its features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from normwise.ops import plain, symbolic
from normwise.ops.choose import long_gain_sums, loses_digits, watches_digits
from normwise.ops.features import feature_norm
from normwise.ops.norm import times_gain


def layer_norm(
    input: Tensor | PackedSequence,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    dim: int | Sequence[int] | None = None,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    act: str | None = None,
    residual: Tensor | PackedSequence | None = None,
    process_group: Any = None,
) -> Tensor | PackedSequence | tuple[Tensor, Tensor] | tuple[PackedSequence, PackedSequence]:
    r"""act(gamma * (x - mean) / sqrt(var + eps) + beta), statistics over the features of one sample.

    With a residual r the result is the pair (y, x + r), where y normalizes x + r: what a pre-norm transformer needs.

    Args:
        input: (*, normalized_shape); a PackedSequence or jagged nested tensor of rows; any tensor if `dim` is given.
        normalized_shape: sizes of the axes that are normalized together.
        weight, bias: gamma and beta, of shape `normalized_shape`.
        eps: added to the (biased) variance.
        dim: the axes of the input that hold `normalized_shape`, in its order; default the last ones.
        mask: bool, True = valid: the input's shape without its channel axis (the first one that `dim` names; without
            `dim` the last), or anything that broadcasts to the input.
        lengths: (N,) integers, valid steps along the last axis of (N, C, L); not where that axis is the only one
            normalized.
        act: "relu", "leaky_relu", "silu" or "gelu", applied last.
        residual: like the input, added before the statistics are taken.
        process_group: the features are spread over the ranks of this group, unevenly if need be, and `input`,
            `normalized_shape`, `weight` and `bias` are this rank's shard; mean and variance are those of whole rows.
            All ranks must call with the same rows.

    Returns:
        Like the input (or the pair); 0 at invalid positions, which neither enter the statistics nor receive a gradient.

    Raises:
        ShapeError: shapes that do not fit. TypeError: dtypes that do not. ValueError: eps <= 0, lengths out of range.

    Source: Ba, Kiros & Hinton 2016, eq. 3 and 4.
    """
    alone = (
        dim is None and mask is None and lengths is None and act is None and residual is None and process_group is None
    )
    if alone:
        y = plain.layer_norm(input, normalized_shape, weight, bias, eps)
        if y is not None:
            return y
    if symbolic.is_traced(input, weight, mask, lengths, residual):
        return symbolic.call_function(  # type: ignore[no-any-return]
            layer_norm,
            input,
            normalized_shape,
            weight,
            bias,
            eps,
            dim=dim,
            mask=mask,
            lengths=lengths,
            act=act,
            residual=residual,
            process_group=process_group,
        )
    return feature_norm(  # type: ignore[no-any-return]
        "layer_norm",
        _aten,
        input,
        normalized_shape,
        weight,
        bias,
        eps,
        center=True,
        dim=dim,
        mask=mask,
        lengths=lengths,
        act=act,
        residual=residual,
        process_group=process_group,
    )


def _aten(
    x: Tensor, normalized_shape: list[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor | None:
    if not watches_digits(x):
        return torch.layer_norm(x, normalized_shape, weight, bias, eps, torch.backends.cudnn.enabled)
    apart = weight is not None and long_gain_sums(x, weight, x.numel() // max(weight.numel(), 1))
    gain, shift = (None, None) if apart else (weight, bias)
    y, mean, rstd = torch.native_layer_norm(x, normalized_shape, gain, shift, eps)
    if loses_digits(mean, rstd):
        return None
    return times_gain(y, weight, bias, normalized_shape) if apart else y
