"""RunningNorm: observations, returns and time series by statistics of their own, there and back."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from normwise.backends.protocol import Moments
from normwise.backends.scalars import flags, number
from normwise.ops import hyperparameters, symbolic
from normwise.ops.errors import ShapeError
from normwise.ops.norm import running_norm
from normwise.ops.norm.running_norm import Scale


class RunningNorm(nn.Module):
    r"""y = (x - mean) / deviation by the statistics of all that was seen so far, and `inverse`, the way back.

    For inputs whose scale is not known before: observations and returns in reinforcement learning, sensors, targets of
    a regression. In training a call first adds its input to the statistics, then normalizes by them; in evaluation it
    only normalizes. The statistics are exact: mean and (biased) variance of all valid elements seen, each with the same
    weight, whatever the sizes of the batches, and of those of all ranks; no moving average. They are constants for the
    gradient, which is that of (x - mean) / deviation. A batch with a NaN or infinite mean or variance is left out.

    `per_instance=True` is reversible instance normalization of time series (N, T, *shape): mean and deviation of each
    instance over its steps, in training and evaluation, kept for `inverse` of the forecast that follows.

    The deviation is sqrt(var + eps), and 1 where all elements are equal: there is no scale then, and `inverse` must
    not crush to it what a model says about the future. There and back it is the same, so inverse(norm(x)) is x to
    rounding, and with eps = 0 an input in other units gives the same y.

    Args:
        shape: of one observation, the last axes of the input: (C,) or C; () for numbers, the default.
        eps: added to the variance; 0 is allowed.
        center: False leaves the mean in and only divides, as is usual for rewards.
        clip: cut y off at +-clip; `inverse` cannot bring back what was cut.
        affine: a gain and a bias of that shape follow, which `inverse` takes off again.
        per_instance: see above.
        across_ranks: share the statistics with all ranks of `process_group` (None: all there are); every rank must
            then call as often as the others. False: each rank has its own.

    Buffers: `mean`, `var` and `count` of that shape, in float64 whatever dtype the model is converted to (float32 on
    devices without it). Until something was seen they are 0, 1 and 0: y is x.

    Source: Chan, Golub & LeVeque 1979 for the sums; Kim et al. 2022 (RevIN) for instances.
    """

    mean: Tensor
    var: Tensor
    count: Tensor

    def __init__(
        self,
        shape: int | Sequence[int] = (),
        *,
        eps: float = 0.0,
        center: bool = True,
        clip: float | None = None,
        affine: bool = False,
        per_instance: bool = False,
        across_ranks: bool = True,
        process_group: Any = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = (shape,) if not isinstance(shape, Sequence) else shape
        self.shape = tuple(hyperparameters.size("shape", s) for s in sizes)
        number("eps", eps, "a number, 0 or more")
        flags(center=center, affine=affine, per_instance=per_instance, across_ranks=across_ranks)
        if not 0 <= eps < math.inf:
            raise ValueError(f"eps must be 0 or positive, but got {eps}: it is added to the variance")
        if clip is not None:
            number("clip", clip, "a positive number or None")
            if not clip > 0:
                raise ValueError(f"clip must be positive, or None to cut nothing off, but got {clip}")
        if per_instance and process_group is not None:
            raise ValueError("per_instance=True shares nothing between ranks: leave process_group out")
        self.eps, self.center, self.clip = eps, center, clip
        self.per_instance, self.across_ranks, self.process_group = per_instance, across_ranks, process_group
        self.scale: Scale | None = None
        where = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.ones(self.shape, **where)) if affine else None  # type: ignore[arg-type]
        self.bias = nn.Parameter(torch.zeros(self.shape, **where)) if affine else None  # type: ignore[arg-type]
        if not per_instance:
            wide = torch.float32 if torch.device(device or "cpu").type == "mps" else torch.float64
            for name, value in (("mean", 0.0), ("var", 1.0), ("count", 0.0)):
                self.register_buffer(name, torch.full(self.shape, value, dtype=wide, device=device))

    def forward(self, input: Tensor, *, mask: Any = None, lengths: Any = None) -> Tensor:
        """(..., *shape) normalized; 0 where invalid.

        Args:
            mask: bool, True = valid, of the input's shape without `shape`, or broadcastable to the input's.
            lengths: (N,) integers, valid steps of (N, T, ..., *shape).

        Raises:
            ShapeError: an input that does not end in `shape`, or without an axis of steps where `per_instance`.
        """
        if symbolic.is_traced(input, mask, lengths):
            return symbolic.call_layer(self, input, mask=mask, lengths=lengths)  # type: ignore[no-any-return]
        y, scale = running_norm.running_norm(
            input,
            self.shape,
            None if self.per_instance else self._seen(),
            self.training,
            mask=mask,
            lengths=lengths,
            affine=self._affine(),
            eps=self.eps,
            center=self.center,
            clip=self.clip,
            across_ranks=self.across_ranks,
            process_group=self.process_group,
        )
        if self.per_instance:
            self.scale = scale
        return y

    def update(self, input: Tensor, *, mask: Any = None, lengths: Any = None) -> None:
        """Add to the statistics what is valid of (..., *shape), in either mode, without normalizing it.

        For instance the discounted returns by whose deviation rewards are then divided, in evaluation mode.
        """
        if self.per_instance:
            raise RuntimeError("per_instance=True computes statistics for each input: there are none to update")
        valid = running_norm.valid_elements(input, self.shape, mask, lengths)
        running_norm.see(self._seen(), input, valid, self.across_ranks, self.process_group)

    def inverse(self, input: Tensor, *, scale: Scale | None = None, shift: bool = True) -> Tensor:
        """Back in the units of the input: x = y * deviation + mean.

        Args:
            input: (..., *shape). Where `per_instance`, (..., N, steps, *shape) with any number of steps, those of the
                forecast.
            scale: of another call: what `.scale` held after it. None: where `per_instance` that of the last call.
            shift: False leaves the mean out, for differences and for the deviations of a forecast distribution.

        Raises:
            RuntimeError: `per_instance`, and nothing was normalized yet.
            ShapeError: an input of other instances.
        """
        if symbolic.is_traced(input, scale):
            return symbolic.call_method(self, "inverse", input, scale=scale, shift=shift)  # type: ignore[no-any-return]
        running_norm.valid_elements(input, self.shape, None, None)
        if scale is None:
            scale = self.scale if self.per_instance else self._scale_of_all()
        if scale is None:
            raise RuntimeError("inverse needs the scale of the instances: normalize them first, or give scale=")
        if self.per_instance and (
            input.dim() < scale.mean.dim() or input.shape[-scale.mean.dim()] != scale.mean.shape[0]
        ):
            n, steps = scale.mean.shape[0], ", ".join(["steps", *map(str, self.shape)])
            raise ShapeError(
                f"expected the {n} instances that were normalized, (..., {n}, {steps}), but got {tuple(input.shape)}"
            )
        return running_norm.inverse(input, scale, self._affine(), shift)

    def reset_running_stats(self) -> None:
        """Forget all that was seen."""
        self.scale = None
        if not self.per_instance:
            self.mean.zero_(), self.var.fill_(1), self.count.zero_()

    def _seen(self) -> Moments:
        return Moments(self.mean, self.var, self.count)

    def _scale_of_all(self) -> Scale:
        return running_norm.scale_of(self.mean, self.var, self.eps, self.center)

    def _affine(self) -> tuple[Tensor, Tensor] | None:
        return None if self.weight is None or self.bias is None else (self.weight, self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RunningNorm:
        """Statistics keep their dtype when a model is converted: a count in bfloat16 would stop at 256."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device, torch.float32 if new.device.type == "mps" else old.dtype)
        return self

    def extra_repr(self) -> str:
        given = {"eps": (self.eps, 0.0), "center": (self.center, True), "clip": (self.clip, None)}
        given |= {"per_instance": (self.per_instance, False), "across_ranks": (self.across_ranks, True)}
        given["affine"] = (self.weight is not None, False)
        return ", ".join([str(self.shape), *(f"{k}={v!r}" for k, (v, default) in given.items() if v != default)])
