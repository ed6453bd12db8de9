"""InstanceNorm1d, InstanceNorm2d, InstanceNorm3d."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from normwise.nn.construct import Activated, affine_without_bias, eps_of, reset_affine
from normwise.ops import check, ragged, running, symbolic
from normwise.ops.instance_norm import instance_norm
from normwise.reference import activation


class _InstanceNorm(Activated, nn.modules.instancenorm._InstanceNorm):
    """The part of InstanceNorm that does not depend on the input's rank; a subclass of torch's own."""

    batched_rank: int

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
    ) -> None:
        num_features = check.whole_number("num_features", num_features)
        check.positive_eps(eps)
        check.momentum_range(momentum)
        if act is not None:
            activation(act)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        affine_without_bias(self, affine and not bias)
        self.act = act

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
    ) -> Any:
        """act(in(input) + residual); see `normwise.functional.instance_norm` for shapes and errors.

        An input without batch axis is one sample, and so are then `mask` and `residual`.
        """
        if symbolic.is_traced(input, mask, lengths, residual):
            return symbolic.call_layer(self, input, mask=mask, lengths=lengths, residual=residual)
        if ragged.is_ragged(input):
            if self.batched_rank != 3:
                raise check.ShapeError(f"{type(self).__name__} takes no ragged input: InstanceNorm1d does")
            return ragged.by_sequences(self.forward, input, mask=mask, lengths=lengths, residual=residual)
        input = check.tensor(type(self).__name__, input)
        check.rank(input, (self.batched_rank - 1, self.batched_rank))
        if input.dim() < self.batched_rank:
            check.same_shape("residual", residual, input)
            assert residual is None or isinstance(residual, Tensor)
            if mask is not None:
                mask = check.mask_tensor(mask, input.device).unsqueeze(0)
            if lengths is not None:
                lengths = check.lengths_tensor(lengths).reshape(1)
            residual = None if residual is None else residual.unsqueeze(0)
            return self.forward(input.unsqueeze(0), mask=mask, lengths=lengths, residual=residual).squeeze(0)
        self._check_channels(input)
        mean, var = self.running_mean, self.running_var
        if self.training and mean is not None and var is not None and running.recomputing():
            mean, var = mean.clone(), var.clone()  # what there is to learn, the first run has learnt
        return instance_norm(
            input,
            mean,
            var,
            self.weight,
            self.bias,
            self.training or not self.track_running_stats,
            self.momentum if self.momentum is not None else 0.0,
            eps_of(self),
            mask=mask,
            lengths=lengths,
            act=self.act,
            residual=residual,
        )

    def extra_repr(self) -> str:
        return str(super().extra_repr()) + ("" if self.act is None else f", act={self.act!r}")

    def _check_channels(self, input: Tensor) -> None:
        found = input.shape[1]
        if found == self.num_features:
            return
        if self.affine or self.track_running_stats:
            raise check.ShapeError(
                f"expected input's size at dim=1 to match num_features ({self.num_features}), but got: {found}."
            )
        warnings.warn(
            f"input's size at dim=1 ({found}) does not match num_features ({self.num_features}), which is not used "
            "because "
            "affine=False: build the layer with the number of channels to silence this",
            stacklevel=3,
        )


class InstanceNorm1d(_InstanceNorm, nn.InstanceNorm1d):
    r"""Instance normalization of (N, C, L) or (C, L), a PackedSequence or a jagged nested tensor.

    y = act(gamma * (x - E[x]) / sqrt(Var[x] + eps) + beta + residual), with mean and variance over the positions of one
    sample and channel. By default there is neither gain nor bias, and no running average.

    A drop-in for `torch.nn.InstanceNorm1d`: same arguments, state_dict and results. Beyond it, `act` at construction
    ("relu", "leaky_relu", "silu", "gelu" or None), and in the call: `mask` (bool, True = valid; (N, L), or
    broadcastable to the input) or `lengths` (valid steps of each sample), and `residual`, added before `act`.

    Source: Ulyanov, Vedaldi & Lempitsky 2016.
    """

    batched_rank = 3


class InstanceNorm2d(_InstanceNorm, nn.InstanceNorm2d):
    """Instance normalization of (N, C, H, W) or (C, H, W); as `InstanceNorm1d`, with `mask` of shape (N, H, W)."""

    batched_rank = 4


class InstanceNorm3d(_InstanceNorm, nn.InstanceNorm3d):
    """Instance normalization of (N, C, D, H, W) or (C, D, H, W); as `InstanceNorm1d`, with `mask` (N, D, H, W)."""

    batched_rank = 5
