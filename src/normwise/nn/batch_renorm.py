"""BatchRenorm1d, BatchRenorm2d, BatchRenorm3d."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from normwise.nn.batch_norm import _BatchNorm
from normwise.nn.construct import eps_of
from normwise.nn.recall import Recall
from normwise.ops import running
from normwise.ops.batch_renorm import batch_renorm_moved, corrected
from normwise.ops.choose import jit_traces
from normwise.ops.running import Moved
from normwise.reference import Moments


@dataclass(frozen=True)
class Ramp:
    """A limit that stays at `start` for the first steps and then grows evenly to `end`.

    ramp(step) = start + (end - start) * clip((step - first) / (last - first), 0, 1)

    Args:
        start, end: the limit before and after.
        first, last: the steps (training batches seen by the layer) between which it grows.
    """

    start: float
    end: float
    first: int
    last: int

    def __post_init__(self) -> None:
        if not 0 <= self.first < self.last:
            raise ValueError(f"a ramp needs 0 <= first < last, but got first={self.first} and last={self.last}")

    def __call__(self, step: int | Tensor) -> Any:
        done = (step - self.first) / (self.last - self.first)
        done = done.clamp(0, 1) if isinstance(done, Tensor) else min(max(done, 0.0), 1.0)
        return self.start + (self.end - self.start) * done


# A number, or a function of the step: an int on the CPU, elsewhere and while compiling a 0-d tensor, so that nothing
# waits for the device.
Limit: TypeAlias = float | Callable[[Any], Any]


class _BatchRenorm(_BatchNorm):
    """The part of BatchRenorm that does not depend on the input's rank."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.01,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        r_max: Limit = Ramp(1, 3, 5_000, 40_000),  # frozen
        d_max: Limit = Ramp(0, 5, 5_000, 25_000),
        bias: bool = True,
        act: str | None = None,
    ) -> None:
        if not track_running_stats:
            raise ValueError(
                f"{type(self).__name__} corrects a batch towards running averages and needs track_running_stats=True; "
                "the norm without them is BatchNorm"
            )
        for name, value, least in (("r_max", r_max, 1), ("d_max", d_max, 0)):
            if not callable(value) and not value >= least:
                raise ValueError(f"{name} must be at least {least} (where it changes nothing), but got {value}")
        super().__init__(num_features, eps, momentum, affine, True, device, dtype, bias=bias, act=act)
        self.r_max, self.d_max = r_max, d_max
        self._kept: Recall[tuple[Tensor, Tensor]] = Recall()

    def _normalize(
        self,
        input: Tensor | PackedSequence,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float | Tensor,
        *,
        mask: Tensor | None,
        lengths: Tensor | None,
        residual: Tensor | PackedSequence | None,
    ) -> tuple[Any, Moved]:
        if not self.training or running_mean is None or running_var is None:
            return super()._normalize(
                input, running_mean, running_var, momentum, mask=mask, lengths=lengths, residual=residual
            )
        return batch_renorm_moved(
            input,
            running_mean,
            running_var,
            self.weight,
            self.bias,
            momentum,
            eps_of(self),
            self._recalled if running.recomputing() else self._correction,
            mask=mask,
            lengths=lengths,
            act=self.act,
            residual=residual,
        )

    def _correction(self, batch: Moments) -> tuple[Tensor, Tensor]:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        tracked = self.num_batches_tracked
        step = int(tracked) if tracked.is_cpu and running.may_read(tracked) and not jit_traces() else tracked
        r_max, d_max = (limit(step) if callable(limit) else limit for limit in (self.r_max, self.d_max))
        r, d = corrected(batch, self.running_mean, self.running_var, r_max, d_max, eps_of(self))
        self._kept.keep(batch.mean, (r, d))
        return r, d

    def _recalled(self, batch: Moments) -> tuple[Tensor, Tensor]:
        """r and d of the first run on this batch: the averages that they came from have moved since."""
        return self._kept.find(batch.mean, type(self).__name__)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, r_max={self.r_max}, d_max={self.d_max}"


class BatchRenorm1d(_BatchRenorm):
    r"""Batch renormalization of (N, C), (N, C, L), a PackedSequence or a jagged nested tensor: for small batches.

    In training y = act(gamma * ((x - mean_B) / sigma_B * r + d) + beta + residual), with the batch's statistics (B) and

        r = clip(sigma_B / sigma, 1 / r_max, r_max), d = clip((mean_B - mean) / sigma, -d_max, d_max),

    where mean and sigma = sqrt(var + eps) are the running averages; r and d are constants for the gradient. Within the
    limits this is what evaluation computes, so training sees what evaluation will see, however small the batch. With
    r_max = 1 and d_max = 0 it is BatchNorm. In evaluation it is BatchNorm; the state_dict has BatchNorm's keys.

    The limits must start as BatchNorm's, while the running averages are not yet those of anything: by default they do
    for 5000 batches and then grow, r_max to 3 by 40000 and d_max to 5 by 25000 (the paper's schedule; for a training
    of other length give a `Ramp` of your own). Steps are counted in `num_batches_tracked`.

    One value a channel (batch 1) is allowed: it stands where d says, within d_max of the running mean. It has no
    deviation, so the running variance stays, and no gradient reaches the input.

    Args:
        num_features, eps, affine, bias, act: as in `BatchNorm1d`.
        momentum: weight of the new batch in the running averages; 0.01 as in the paper, not BatchNorm's 0.1; None for
            a cumulative average.
        track_running_stats: must be True.
        r_max: at least 1: a number, or a function of the step.
        d_max: at least 0: a number, or a function of the step.

    Source: Ioffe 2017, algorithm 1. There the average is of sigma, here, as in BatchNorm, of the (unbiased) variance.
    """

    ranks = (2, 3)


class BatchRenorm2d(_BatchRenorm):
    """Batch renormalization of (N, C, H, W); as `BatchRenorm1d`, with `mask` of shape (N, H, W)."""

    ranks = (4,)


class BatchRenorm3d(_BatchRenorm):
    """Batch renormalization of (N, C, D, H, W); as `BatchRenorm1d`, with `mask` of shape (N, D, H, W)."""

    ranks = (5,)
