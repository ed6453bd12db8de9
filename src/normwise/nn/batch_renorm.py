"""BatchRenorm1d, BatchRenorm2d, BatchRenorm3d."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from normwise.backends.scalars import flags, number
from normwise.nn.batch_norm import _BatchNorm
from normwise.nn.construct import affine
from normwise.ops import symbolic
from normwise.ops.norm.batch_renorm import Limit, batch_renorm_with_stats


@dataclass(frozen=True)
class LinearRamp:
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
        for name in ("start", "end", "first", "last"):
            number(name, getattr(self, name), "a number")
        if not 0 <= self.first < self.last:
            raise ValueError(f"a ramp needs 0 <= first < last, but got first={self.first} and last={self.last}")

    def __call__(self, step: int | Tensor) -> Any:
        done = (step - self.first) / (self.last - self.first)
        done = done.clamp(0, 1) if isinstance(done, Tensor) else min(max(done, 0.0), 1.0)
        return self.start + (self.end - self.start) * done


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
        r_max: Limit = LinearRamp(1, 3, 5_000, 40_000),  # frozen
        d_max: Limit = LinearRamp(0, 5, 5_000, 25_000),
        bias: bool = True,
        act: str | None = None,
        dim: int = 1,
        correction: int = 1,
    ) -> None:
        flags(track_running_stats=track_running_stats)
        if not track_running_stats:
            raise ValueError(
                f"{type(self).__name__} corrects a batch towards running averages and needs track_running_stats=True; "
                "the norm without them is BatchNorm"
            )
        for name, value, least in (("r_max", r_max, 1), ("d_max", d_max, 0)):
            if callable(value):
                continue
            number(name, value, f"a number, {least} or more, or a function of the step")
            if not value >= least:
                raise ValueError(f"{name} must be at least {least} (where it changes nothing), but got {value}")
        options: dict[str, Any] = {"bias": bias, "act": act, "dim": dim, "correction": correction}
        super().__init__(num_features, eps, momentum, affine, True, device, dtype, **options)
        self.r_max, self.d_max = r_max, d_max

    def forward(
        self,
        input: Tensor | PackedSequence,
        *,
        mask: Tensor | None = None,
        lengths: Tensor | None = None,
        residual: Tensor | PackedSequence | None = None,
        segments: Tensor | None = None,
        domain: int | Tensor | None = None,
        act: str | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> Any:
        """See `BatchRenorm1d`; shapes and errors as in `normwise.functional.batch_norm`."""
        if not self.training:
            given: dict[str, Any] = {"mask": mask, "lengths": lengths, "residual": residual, "segments": segments}
            return super().forward(input, **given, domain=domain, act=act, scale=scale, shift=shift)
        if domain is not None:
            self._of_domain(domain)  # of which it has none
        if segments is not None:
            raise ValueError(
                f"{type(self).__name__} corrects one batch towards running averages and takes no segments in training: "
                "BatchNorm1d does"
            )
        if symbolic.is_traced(input, mask, lengths, residual, scale, shift):
            given = {"mask": mask, "lengths": lengths, "residual": residual, "scale": scale, "shift": shift}
            return symbolic.call_layer(self, input, act=act, **given)
        weight, bias = affine(self)
        mean, var, tracked = self._running_stats()
        y, updated = batch_renorm_with_stats(
            input,
            mean,  # type: ignore[arg-type]
            var,  # type: ignore[arg-type]
            weight,
            bias,
            self._momentum(),
            self.__dict__["eps"],
            self.r_max,
            self.d_max,
            num_batches_tracked=tracked,  # type: ignore[arg-type]
            mask=mask,
            lengths=lengths,
            act=self.act if act is None else act,
            residual=residual,
            ranks=self.ranks,
            dim=self.dim,
            correction=self.correction,
            scale=scale,
            shift=shift,
        )
        if updated is not True:
            self._count_skipped(updated)
        return y

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, r_max={self.r_max}, d_max={self.d_max}"


class BatchRenorm1d(_BatchRenorm):
    r"""Batch renormalization of (N, C), (N, C, L), a PackedSequence or a jagged nested tensor: for small batches.

    In training y = act(gamma * ((x - mean_B) / sigma_B * r + d) + beta + residual), with the batch's statistics (B) and

        r = clip(sigma_B / sigma, 1 / r_max, r_max), d = clip((mean_B - mean) / sigma, -d_max, d_max),

    where mean and sigma = sqrt(var + eps) are the running averages; no gradient flows through r and d. Within the
    limits this is what evaluation computes, so training sees what evaluation will see, however small the batch. With
    r_max = 1 and d_max = 0 it is BatchNorm. In evaluation it is BatchNorm; the state_dict has BatchNorm's keys.

    The limits must start as BatchNorm's, while the running averages are still far from the data's: by default they do
    for 5000 batches and then grow, r_max to 3 by 40000 and d_max to 5 by 25000 (the paper's schedule; for a training
    of other length give a `LinearRamp` of your own). Steps are counted in `num_batches_tracked`.

    One value per channel (batch 1) is allowed: it stands where d says, within d_max of the running mean. It has no
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
