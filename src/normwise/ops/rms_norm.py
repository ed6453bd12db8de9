"""Root mean square normalization: LayerNorm that leaves the mean in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from normwise.ops import check, plain, symbolic
from normwise.ops.features import feature_norm
from normwise.reference import accumulation_dtype


def rms_norm(
    input: Tensor | PackedSequence,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    dim: int | Sequence[int] | None = None,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    act: str | None = None,
    residual: Tensor | PackedSequence | None = None,
    process_group: Any = None,
) -> Tensor | PackedSequence | tuple[Tensor, Tensor] | tuple[PackedSequence, PackedSequence]:
    r"""act(gamma * x / sqrt(mean(x^2) + eps)), the mean square over the features of one sample.

    Arguments, result and errors are those of `layer_norm`, without a bias. `eps` None stands for the machine epsilon
    of the dtype that statistics are computed in (float32, or float64 for float64 inputs), as in torch.

    Source: Zhang & Sennrich 2019, eq. 4.
    """
    data = input.data if isinstance(input, PackedSequence) else input
    if eps is None and isinstance(data, Tensor):
        eps = torch.finfo(accumulation_dtype(data.dtype)).eps
    alone = (
        dim is None and mask is None and lengths is None and act is None and residual is None and process_group is None
    )
    if alone and eps is not None:
        y = plain.rms_norm(input, normalized_shape, weight, eps)
        if y is not None:
            return y
    if symbolic.is_traced(input, weight, mask, lengths, residual):
        return symbolic.call_function(  # type: ignore[no-any-return]
            rms_norm,
            input,
            normalized_shape,
            weight,
            eps,
            dim=dim,
            mask=mask,
            lengths=lengths,
            act=act,
            residual=residual,
            process_group=process_group,
        )
    check.tensor("rms_norm", data)
    assert eps is not None
    return feature_norm(  # type: ignore[no-any-return]
        "rms_norm",
        _aten,
        input,
        normalized_shape,
        weight,
        None,
        eps,
        center=False,
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
    return torch.rms_norm(x, normalized_shape, weight, eps)
