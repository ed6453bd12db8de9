"""GroupNorm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from normwise.nn.construct import Activated, affine_without_bias, eps_of, reset_affine
from normwise.ops import check, ragged, symbolic
from normwise.ops.group_norm import group_norm, groups_divide
from normwise.reference import activation


class GroupNorm(Activated, nn.GroupNorm):
    r"""Group normalization of (N, C, ...), a PackedSequence or a jagged nested tensor.

    y = act(gamma * (x - E[x]) / sqrt(Var[x] + eps) + beta + residual), with mean and variance of each sample over a
    group of C / num_groups neighbouring channels and all positions; gamma and beta per channel. Independent of the
    batch. `GroupNorm(32, C, act="silu")` is the norm and activation of diffusion models' U-nets in one pass.

    A drop-in for `torch.nn.GroupNorm`: same arguments, state_dict and results. Beyond it, in the call: `mask` (bool,
    True = valid; the input's shape without the channel axis, or broadcastable to it) or `lengths` (valid steps along
    the last axis), and `residual`, added before `act`.

    Args:
        num_groups: into how many groups of neighbouring channels C is divided.
        num_channels: C.
        eps: added to the variance.
        affine: learn gamma and beta.
        bias: learn beta.
        act: "relu", "leaky_relu", "silu", "gelu" or None.

    Source: Wu & He 2018.
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        act: str | None = None,
    ) -> None:
        num_groups = check.whole_number("num_groups", num_groups)
        num_channels = check.whole_number("num_channels", num_channels)
        check.positive_eps(eps)
        if act is not None:
            activation(act)
        groups_divide(num_groups, num_channels)
        super().__init__(num_groups, num_channels, eps, affine, device, dtype)
        affine_without_bias(self, affine and not bias)
        self.act = act

    def reset_parameters(self) -> None:
        """Gain 1, bias 0."""
        reset_affine(self)

    def forward(
        self,
        input: Tensor | PackedSequence,
        *,
        mask: Tensor | None = None,
        lengths: Tensor | None = None,
        residual: Tensor | PackedSequence | None = None,
    ) -> Any:
        """act(gn(input) + residual); see `normwise.functional.group_norm` for shapes and errors."""
        if symbolic.is_traced(input, mask, lengths, residual):
            node = symbolic.call_layer(self, input, function=True, mask=mask, lengths=lengths, residual=residual)
            if node is not None:
                return node
        elif ragged.is_ragged(input):
            return ragged.by_sequences(self.forward, input, mask=mask, lengths=lengths, residual=residual)
        else:
            found = check.tensor(type(self).__name__, input).shape
            if len(found) > 1 and found[1] != self.num_channels:
                raise check.ShapeError(
                    f"expected input's size at dim=1 to match num_channels ({self.num_channels}), but got: {found[1]}."
                )
        return group_norm(
            input,
            self.num_groups,
            self.weight,
            self.bias,
            eps_of(self),
            mask=mask,
            lengths=lengths,
            act=self.act,
            residual=residual,
        )

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.act is None else f", act={self.act!r}")
