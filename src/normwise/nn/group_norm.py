"""GroupNorm."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from normwise.nn.construct import affine_without_bias, reset_affine
from normwise.ops import check
from normwise.ops.group_norm import group_norm, groups_divide


class GroupNorm(nn.GroupNorm):
    r"""Group normalization of (N, C, ...).

    y = gamma * (x - E[x]) / sqrt(Var[x] + eps) + beta, with mean and variance of each sample over a group of
    C / num_groups neighbouring channels and all positions; gamma and beta per channel. Independent of the batch.

    A drop-in for `torch.nn.GroupNorm`: same arguments, state_dict and results. Beyond it, in the call: `mask` (bool,
    True = valid; the input's shape without the channel axis, or broadcastable to it) or `lengths` (valid steps along
    the last axis).

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
    ) -> None:
        check.positive_eps(eps)
        groups_divide(num_groups, num_channels)
        super().__init__(num_groups, num_channels, eps, affine, device, dtype)
        affine_without_bias(self, affine and not bias)

    def reset_parameters(self) -> None:
        """Gain 1, bias 0."""
        reset_affine(self)

    def forward(self, input: Tensor, *, mask: Tensor | None = None, lengths: Tensor | None = None) -> Tensor:
        """See `normwise.functional.group_norm` for shapes and errors."""
        if input.dim() > 1 and input.shape[1] != self.num_channels:
            raise check.ShapeError(
                f"expected input's size at dim=1 to match num_channels ({self.num_channels}), but got: "
                f"{input.shape[1]}."
            )
        return group_norm(input, self.num_groups, self.weight, self.bias, self.eps, mask=mask, lengths=lengths)
