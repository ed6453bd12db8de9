"""SyncBatchNorm: BatchNorm over the batches of all ranks."""

from __future__ import annotations

from typing import Any

import torch

from normwise.nn.batch_norm import _BatchNorm
from normwise.ops.distributed import StatsGroup


class SyncBatchNorm(_BatchNorm):
    r"""Batch normalization over the batches of all ranks of torch.distributed, as if they were one.

    The formula, `mask`, `lengths`, `residual` and `act` are those of `BatchNorm1d`; in training mean and variance are
    of the valid elements on all ranks, each counted once. So outputs, running averages and the gradients of the sum of
    all ranks' losses are those of `BatchNorm` over the concatenated batch, where ranks hold different numbers of
    samples, or none. (DistributedDataParallel takes the MEAN of the ranks' gradients: weight the losses accordingly.)
    One exchange of 3 numbers per channel forward, one of 2 backward; the layer's first forward compares the number of
    channels as well.

    Takes (N, C) to (N, C, D, H, W), a PackedSequence or a jagged nested tensor, on any device that the group's backend
    serves: gloo on the CPU too, which `torch.nn.SyncBatchNorm` refuses. Arguments and state_dict are torch's. In
    evaluation, with one rank, and without torch.distributed it is BatchNorm. Differentiable twice.

    Pitfall: all ranks must run the same layers in the same order, forward and backward, also a rank without data: feed
    it an empty batch, and sum its losses (the mean of nothing is NaN).

    Args:
        num_features: C.
        eps: added to the variance.
        momentum: weight of the new batch in the running averages; None for a cumulative average.
        affine: learn gamma and beta.
        track_running_stats: keep running averages; without them evaluation uses this rank's batch.
        process_group: the ranks that share statistics; None for all of them.
        bias: learn beta.
        act: "relu", "leaky_relu", "silu", "gelu", "relu6", "hardswish", "hardsigmoid", "elu", "gelu_tanh", "softplus",
            "mish" or None.
        dim: the axis of the channels, e.g. -1 for (N, L, C).
        correction: the running variance divides by count - correction: 1 as in torch, 0 as in Keras and Flax.

    Raises:
        RuntimeError, in training: this process was started as one of several ranks (WORLD_SIZE, as torchrun sets it)
            that are not connected; another rank died or did not take part within the group's timeout.
        ValueError, on every rank: the ranks disagree in the number of channels, or (on the CPU) in the dtype; the
            batches of all ranks together hold one value per channel.

    Source: Ioffe & Szegedy 2015; Chan, Golub & LeVeque 1979 for the combined variance.
    """

    ranks = (2, 3, 4, 5)

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        act: str | None = None,
        dim: int = 1,
        correction: int = 1,
    ) -> None:
        options: dict[str, Any] = {"bias": bias, "act": act, "dim": dim, "correction": correction}
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, **options)
        self._stats_group = StatsGroup(process_group, default=True)

    @property
    def process_group(self) -> Any:
        """The ranks that share statistics; None for all of them."""
        return None if self._stats_group is None else self._stats_group.process_group

    def extra_repr(self) -> str:
        group = "" if self.process_group is None else f", process_group={self._stats_group!r}"
        return super().extra_repr() + group
