"""InstanceNorm1d, InstanceNorm2d, InstanceNorm3d."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from normwise.backends.activations import activation
from normwise.backends.scalars import flags
from normwise.nn.construct import Activated, affine, affine_without_bias, reset_affine
from normwise.ops import hyperparameters, symbolic
from normwise.ops.norm.instance_norm import instance_norm_of


class _InstanceNorm(Activated, nn.modules.instancenorm._InstanceNorm):
    """The part of InstanceNorm that does not depend on the input's rank; a subclass of torch's own."""

    batched_rank: int
    dim = 1  # of layers pickled by earlier versions

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        act: str | None = None,
        dim: int = 1,
    ) -> None:
        num_features = hyperparameters.size("num_features", num_features)
        hyperparameters.positive_eps(eps)
        hyperparameters.momentum_range(momentum)
        flags(affine=affine, track_running_stats=track_running_stats, bias=bias)
        if act is not None:
            activation(act)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        affine_without_bias(self, affine and not bias)
        self.act, self.dim = act, hyperparameters.channel_dim(dim)

    def reset_parameters(self) -> None:
        """Gain 1, bias 0, running mean 0 and variance 1."""
        self.reset_running_stats()
        reset_affine(self)

    def forward(
        self,
        input: Tensor | PackedSequence,
        *,
        mask: Tensor | None = None,
        lengths: Tensor | None = None,
        residual: Tensor | PackedSequence | None = None,
        segments: Tensor | None = None,
        act: str | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> Any:
        """act(in(input) + residual); see `normwise.functional.instance_norm` for shapes and errors.

        `act` here is for this call, in the place of the layer's.

        An input without batch axis is one sample, and so are then `mask` and `residual`.
        """
        if symbolic.is_traced(input, mask, lengths, residual, segments) or (
            not (scale is shift is None) and symbolic.is_traced(scale, shift)
        ):
            given: dict[str, Any] = {
                "mask": mask,
                "lengths": lengths,
                "residual": residual,
                "segments": segments,
                "act": act,
                "scale": scale,
                "shift": shift,
            }
            return symbolic.call_layer(self, input, **given)
        if segments is None and not (self.affine or self.track_running_stats):
            self._warn_of_channels(input)
        weight, bias = affine(self)
        return instance_norm_of(
            input,
            self.running_mean,
            self.running_var,
            weight,
            bias,
            self.training or not self.track_running_stats,
            self.momentum if self.momentum is not None else 0.0,
            self.__dict__["eps"],
            mask=mask,
            lengths=lengths,
            act=self.act if act is None else act,
            residual=residual,
            rank=self.batched_rank,
            num_features=self.num_features if self.affine or self.track_running_stats else None,
            segments=segments,
            dim=self.dim,
            scale=scale,
            shift=shift,
        )

    def extra_repr(self) -> str:
        dim = "" if self.dim == 1 else f", dim={self.dim}"
        return str(super().extra_repr()) + ("" if self.act is None else f", act={self.act!r}") + dim

    def _warn_of_channels(self, input: Any) -> None:
        """Warns of a wrong number of channels, which does no harm here but is hardly intended."""
        if not isinstance(input, Tensor) or input.is_nested or input.dim() < self.batched_rank - 1:
            return
        found = input.shape[1 - self.batched_rank if self.dim == 1 else self.dim]
        if found != self.num_features:
            warnings.warn(
                f"input's size at dim=1 ({found}) does not match num_features ({self.num_features}), which is not used "
                "because affine=False: build the layer with the number of channels to silence this",
                stacklevel=4,
            )


class InstanceNorm1d(_InstanceNorm, nn.InstanceNorm1d):
    r"""Instance normalization of (N, C, L) or (C, L), a PackedSequence or a jagged nested tensor.

    y = act(gamma * (x - E[x]) / sqrt(Var[x] + eps) + beta + residual), with mean and variance over the positions of one
    sample and channel. By default there is neither gain nor bias, and no running average.

    A drop-in for `torch.nn.InstanceNorm1d`: same arguments, state_dict and results. Beyond it, `act` at construction
    ("relu", "leaky_relu", "silu", "gelu", "relu6", "hardswish", "hardsigmoid", "elu", "gelu_tanh", "softplus", "mish"
    or None), and in the call: `mask` (bool, True = valid; (N, L), or broadcastable to the input) or `lengths` (valid
    steps of each sample), and `residual`, added before `act`; `segments` (R,) for the rows (R, C) of many graphs or
    clouds, each of which is then a sample; `scale` and `shift` (N, C), which go with the sample.

    Source: Ulyanov, Vedaldi & Lempitsky 2016.
    """

    batched_rank = 3


class InstanceNorm2d(_InstanceNorm, nn.InstanceNorm2d):
    """Instance normalization of (N, C, H, W) or (C, H, W); as `InstanceNorm1d`, with `mask` of shape (N, H, W)."""

    batched_rank = 4


class InstanceNorm3d(_InstanceNorm, nn.InstanceNorm3d):
    """Instance normalization of (N, C, D, H, W) or (C, D, H, W); as `InstanceNorm1d`, with `mask` (N, D, H, W)."""

    batched_rank = 5
