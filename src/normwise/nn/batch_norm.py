"""BatchNorm1d, BatchNorm2d, BatchNorm3d."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from normwise.nn.construct import affine_without_bias, reset_affine
from normwise.ops import check
from normwise.ops.batch_norm import batch_norm
from normwise.ops.ragged import is_ragged
from normwise.reference import activation


class _BatchNorm(nn.modules.batchnorm._BatchNorm):
    """The part of BatchNorm that does not depend on the input's rank.

    A subclass of torch's own, so that code that looks for BatchNorm layers (weight averaging, optimizer groups,
    conversion) finds these too.
    """

    ranks: tuple[int, ...]

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        act: str | None = None,
    ) -> None:
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
        """act(bn(input) + residual); see `normwise.functional.batch_norm` for shapes and errors."""
        if isinstance(input, Tensor) and not is_ragged(input):
            check.rank(input, self.ranks)
        elif 2 not in self.ranks:
            raise check.ShapeError(f"{type(self).__name__} takes no ragged input: BatchNorm1d does")
        learns = self.training and self.track_running_stats
        y = batch_norm(
            input,
            self.running_mean if not self.training or self.track_running_stats else None,
            self.running_var if not self.training or self.track_running_stats else None,
            self.weight,
            self.bias,
            self.training,
            self._momentum() if learns else 0.0,
            self.eps,
            mask=mask,
            lengths=lengths,
            act=self.act,
            residual=residual,
        )
        if learns and self.num_batches_tracked is not None:
            # After the op, so that a refused input is not counted.
            self.num_batches_tracked.add_(1)
        return y

    def _momentum(self) -> float | Tensor:
        """The weight of the next batch: `momentum`, or that of a cumulative average."""
        if self.momentum is not None:
            return self.momentum
        if self.num_batches_tracked is None or self.running_mean is None:
            return 0.0
        if torch.compiler.is_compiling():
            # The count stays a tensor: its value is not known while compiling.
            return 1.0 / (self.num_batches_tracked + 1).to(self.running_mean.dtype)
        return 1.0 / (int(self.num_batches_tracked) + 1)

    def extra_repr(self) -> str:
        act = "" if self.act is None else f", act={self.act!r}"
        return str(super().extra_repr()) + act


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    r"""Batch normalization of (N, C), (N, C, L), a PackedSequence or a jagged nested tensor.

    y = act(gamma * (x - E[x]) / sqrt(Var[x] + eps) + beta + residual), with mean and variance of each of the
    `num_features` channels over the batch (and its steps) in training, and their running averages in evaluation.
    The running averages move by `momentum`: running = (1 - momentum) * running + momentum * batch.

    A drop-in for `torch.nn.BatchNorm1d`: same arguments, state_dict and results. Beyond it, in the call: `mask`
    (bool, True = valid; (N, L), or broadcastable to the input) or `lengths` (valid steps of each sample) keep padding
    out of the statistics, and `residual` is added before `act`.

    Pitfall: with one value a channel in training there is no deviation, and with few the statistics are rough: at
    small batches prefer LayerNorm or GroupNorm.

    Args:
        num_features: C.
        eps: added to the variance.
        momentum: weight of the new batch in the running averages; None for a cumulative average.
        affine: learn gamma and beta.
        track_running_stats: keep running averages; without them evaluation uses the batch's statistics too.
        bias: learn beta.
        act: "relu", "leaky_relu", "silu", "gelu" or None.

    Source: Ioffe & Szegedy 2015.
    """

    ranks = (2, 3)


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    """Batch normalization of (N, C, H, W); as `BatchNorm1d`, with `mask` of shape (N, H, W)."""

    ranks = (4,)


class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    """Batch normalization of (N, C, D, H, W); as `BatchNorm1d`, with `mask` of shape (N, D, H, W)."""

    ranks = (5,)
