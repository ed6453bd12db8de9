"""GroupNorm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from normwise.backends.activations import activation
from normwise.backends.scalars import flags
from normwise.nn.construct import Activated, affine, affine_without_bias, reset_affine
from normwise.ops import hyperparameters, symbolic
from normwise.ops.norm.group_norm import group_norm_of, groups_divide


class GroupNorm(Activated, nn.GroupNorm):
    r"""Group normalization of (N, C, ...), a PackedSequence or a jagged nested tensor.

    y = act(gamma * (x - E[x]) / sqrt(Var[x] + eps) + beta + residual), with mean and variance of each sample over a
    group of C / num_groups neighbouring channels and all positions; gamma and beta per channel. Independent of the
    batch. `GroupNorm(32, C, act="silu")` is the norm and activation of diffusion models' U-nets in one pass.

    A drop-in for `torch.nn.GroupNorm`: same arguments, state_dict and results. Beyond it, in the call: `mask` (bool,
    True = valid; the input's shape without the channel axis, or broadcastable to it) or `lengths` (valid steps along
    the last axis), `residual`, added before `act`, and `scale` and `shift` (N, C), which go with the sample.

    Args:
        num_groups: into how many groups of neighbouring channels C is divided.
        num_channels: C.
        eps: added to the variance.
        affine: learn gamma and beta.
        bias: learn beta.
        act: "relu", "leaky_relu", "silu", "gelu", "relu6", "hardswish", "hardsigmoid", "elu", "gelu_tanh", "softplus",
            "mish" or None.
        dim: the axis of the channels, e.g. -1 for (N, L, C).

    Source: Wu & He 2018.
    """

    dim = 1  # of layers pickled by earlier versions

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
        dim: int = 1,
    ) -> None:
        num_groups = hyperparameters.whole_number("num_groups", num_groups)
        num_channels = hyperparameters.size("num_channels", num_channels)
        hyperparameters.positive_eps(eps)
        flags(affine=affine, bias=bias)
        if act is not None:
            activation(act)
        groups_divide(num_groups, num_channels)
        super().__init__(num_groups, num_channels, eps, affine, device, dtype)
        affine_without_bias(self, affine and not bias)
        self.act, self.dim = act, hyperparameters.channel_dim(dim)

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
        act: str | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> Any:
        """act(gn(input) + residual); see `normwise.functional.group_norm` for shapes and errors.

        `act` here is for this call, in the place of the layer's.
        """
        if symbolic.is_traced(input, mask, lengths, residual) or (
            not (scale is shift is None) and symbolic.is_traced(scale, shift)
        ):
            node = symbolic.call_layer(
                self,
                input,
                function=True,
                mask=mask,
                lengths=lengths,
                residual=residual,
                act=act,
                scale=scale,
                shift=shift,
            )
            if node is not None:
                return node
        weight, bias = affine(self)
        return group_norm_of(
            input,
            self.num_groups,
            weight,
            bias,
            self.__dict__["eps"],
            mask=mask,
            lengths=lengths,
            act=self.act if act is None else act,
            residual=residual,
            num_channels=self.num_channels,
            dim=self.dim,
            scale=scale,
            shift=shift,
        )

    def extra_repr(self) -> str:
        dim = "" if self.dim == 1 else f", dim={self.dim}"
        return super().extra_repr() + ("" if self.act is None else f", act={self.act!r}") + dim
