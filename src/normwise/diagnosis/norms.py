"""What is seen of a norm layer: where its statistics come from, how good they are, what gain and bias do."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from normwise.diagnosis.distributions import Moments, add_rows, distribution
from normwise.diagnosis.layers import norm_kind, norm_of
from normwise.diagnosis.padding import Valid, counted
from normwise.diagnosis.records import Norm, Running
from normwise.measure.axes import by_axis
from normwise.nn.construct import channel_axis, eps_of, gain_of, offset_of

# A gain this small beside the layer's median one passes nothing on.
DEAD_GAIN = 1e-3


_OF_CHANNELS = ("batch", "renorm", "instance", "group", "frozen")


class NormWatch:
    """One norm layer over all batches, in train mode."""

    def __init__(self, module: nn.Module, was_training: bool) -> None:
        self.module, self.was_training = module, was_training
        # What says how it computes, where its class is neither torch.nn's nor normwise's.
        self.norm = norm_of(module)
        self.kind = norm_kind(module) or ""
        self.mean: Tensor | None = getattr(self.norm, "running_mean", None)
        self.var: Tensor | None = getattr(self.norm, "running_var", None)
        # Of several domains nobody says which one a batch should be compared with.
        compared = self.mean is not None and self.var is not None and self.mean.dim() == 1
        self.before = (self.mean.clone(), self.var.clone()) if compared else None  # type: ignore[union-attr]
        tracked = getattr(self.norm, "num_batches_tracked", None)
        self.tracked = None if tracked is None else int(tracked.sum())
        self.moments = Moments()
        self.values: int | None = None
        self.samples: int | None = None
        self.total_samples = 0
        self.lengths: list[int] | None = None
        self.masked: list[bool] = []
        self.segmented: list[bool] = []
        self.padding: list[float] = []
        self.padding_shift: list[float] = []
        self.noise = self.needed_eps = 0.0
        self.largest: float | None = None
        self.fed_by: list[str | None] = []
        self.moves = self.inside_recurrence = self.used_batch = False

    @torch.no_grad()
    def add(
        self, x: Tensor, kwargs: dict[str, Any], args: Any, samples: int, valid: Valid | None, *, lean: bool = False
    ) -> None:
        """One call with first input `x`, of a batch of `samples` samples, or 0 where nobody knows."""
        x = x.detach()
        # (N * T, C) has more rows than there are samples.
        samples = min(len(x), samples) if samples else len(x)
        over_batch = self.kind in ("batch", "renorm", "instance")
        uses_batch = over_batch and (self.module.training or self.mean is None)
        self.used_batch = self.used_batch or uses_batch
        given = kwargs.get("mask") is not None or kwargs.get("lengths") is not None
        ragged = x.is_nested or any(isinstance(a, PackedSequence) for a in args)
        self.masked.append(given or ragged)
        segments = kwargs.get("segments")
        self.segmented.append(segments is not None)
        if x.is_nested or not x.numel() or x.dim() < 2:
            return
        if self.kind in _OF_CHANNELS and (axis := channel_axis(self.norm)) != 1:
            x = x.movedim(axis, 1)
            mask = kwargs.get("mask")
            if isinstance(mask, Tensor) and mask.dim() == x.dim():
                kwargs = {**kwargs, "mask": mask.movedim(axis, 1)}
        if x.dim() == 3:
            shortest, longest = self.lengths or (x.shape[2], x.shape[2])
            self.lengths = [min(shortest, x.shape[2]), max(longest, x.shape[2])]
        mask = counted(self.module, x, kwargs)
        if over_batch:
            rows = by_axis(x, 1)
            within = None if mask is None else mask.movedim(1, 0).flatten(1)
            values = rows.shape[1] if within is None else int(within.sum(1).min())
            if values and not (given and mask is None):
                if segments is not None:
                    self._count(*[_rows_of_a_segment(segments, within)] * 2)
                else:
                    self._count(x[0, 0].numel() if self.kind == "instance" else values, samples)
                if not self.moments.count.dim() or len(self.moments.mean) == len(rows):
                    add_rows(self.moments, rows, within)
                    self.total_samples += samples
        if not given and not ragged and self.kind in ("batch", "renorm", "instance", "group") and valid is not None:
            self._look_for_padding(x, valid)
        if not lean and (normalized := self._normalized(x, kwargs)) is not None:
            self._look_at_rounding(normalized)
            if not given:
                self._look_at_size(normalized)

    def _normalized(self, x: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
        """What a call takes statistics of, each of them of a part that its shape tells; None where other parts, or
        another tensor, are meant: segments, what a gate has multiplied."""
        if kwargs.get("segments") is not None:
            return None
        if kwargs.get("gate") is not None and getattr(self.norm, "gate_first", False):
            return None
        added = kwargs.get("add")
        return x + added.detach() if isinstance(added, Tensor) and added.shape == x.shape else x

    def _count(self, values: int, samples: int) -> None:
        part = getattr(self.module, "virtual_batch_size", None)
        if part and part < samples:
            values, samples = values * part // samples, part
        self.values = values if self.values is None else min(values, self.values)
        self.samples = samples if self.samples is None else min(samples, self.samples)

    def _look_for_padding(self, x: Tensor, valid: Valid) -> None:
        if not valid.padding:
            return
        mask = _positions(x, valid)
        if mask is None:
            return
        rows = by_axis(x, 1)
        inside = rows[:, mask.reshape(-1).to(x.device)]
        if not inside.shape[1]:
            return
        std, mean = torch.std_mean(inside, dim=1, correction=0)
        moved = ((rows.mean(1) - mean).abs() / (std + math.sqrt(self.eps))).median()
        self.padding.append(1 - float(mask.double().mean()))
        self.padding_shift.append(float(moved))

    def _look_at_rounding(self, x: Tensor) -> None:
        """Statistics whose variance is not more than the rounding of the input: what they scale up is noise."""
        rows = self._sharing(x)
        if rows is None or not rows.numel():
            return
        rows = rows.double()
        var, mean = torch.var_mean(rows, dim=1, correction=0)
        size = (var + mean.square()).sqrt()
        rounding = torch.finfo(x.dtype).eps * size
        only_rounding = (var <= rounding.square()) & (var > (1e-12 * size).square())
        if bool(only_rounding.any()):
            noise = (rounding / (var + self.eps).sqrt())[only_rounding]
            if float(noise.max()) > self.noise:
                self.noise = float(noise.max())
                self.needed_eps = float((100 * rounding[only_rounding]).square().max())

    def _look_at_size(self, x: Tensor) -> None:
        """The largest number that is squared. Padding that a mask leaves out may be of any size: not asked then."""
        rows = self._sharing(x) if self.kind in ("layer", "rms", "group", "instance") else None
        if rows is None or not rows.numel():
            return
        low, high = torch.aminmax(rows, dim=1)
        if self.kind != "rms":
            mean = rows.mean(1, dtype=torch.promote_types(x.dtype, torch.float32))
            low, high = low - mean, high - mean
        size = float(torch.maximum(low.abs(), high.abs()).max())
        if math.isfinite(size):
            self.largest = max(self.largest or 0.0, size)

    def _sharing(self, x: Tensor) -> Tensor | None:
        """`x` with one row for each statistic; None where that is not plain from the layer."""
        if self.kind == "frozen":
            return None
        if self.kind in ("batch", "renorm"):
            return by_axis(x, 1)
        if self.kind == "instance":
            return x.flatten(0, 1).flatten(1) if x.dim() > 2 else None
        if self.kind == "group":
            return x.reshape(x.shape[0] * self.norm.num_groups, -1)  # type: ignore[arg-type,operator]
        axes = len(self.norm.normalized_shape)  # type: ignore[arg-type]
        return x.flatten(-axes).flatten(0, -2) if getattr(self.norm, "dim", None) is None and x.dim() > axes else None

    @property
    def eps(self) -> float:
        eps = eps_of(self.norm)
        return float(eps) if isinstance(eps, (int, float)) else 0.0

    def finish(self) -> None:
        """After the passes in train mode, before anything is put back."""
        if self.before is not None:
            self.moves = not all(
                torch.equal(now, then) or bool(then.isnan().any())
                for now, then in zip((self.mean, self.var), self.before, strict=True)
                if now is not None
            )

    @property
    def gain_name(self) -> str:
        """What the layer calls its gain."""
        gain = getattr(self.norm, "weight", None)
        return next((name for name, p in self.module.named_parameters(recurse=False) if p is gain), "weight")

    def record(self, gain_gradient: float | None) -> Norm:
        module = self.norm
        weight, bias = (getattr(module, name, None) for name in ("weight", "bias"))
        gain = gain_of(module)
        feeding = set(self.fed_by)
        affine = [p for p in (weight, bias) if isinstance(p, nn.Parameter)]
        momentum = getattr(module, "momentum", None)
        return Norm(
            kind=self.kind,
            synchronized="SyncBatchNorm" in (c.__name__ for c in type(self.module).__mro__),
            batch_statistics=self.used_batch,
            was_training=self.was_training,
            trainable=any(p.requires_grad for p in affine) if affine else None,
            values=self.values,
            samples=self.samples,
            lengths=self.lengths,
            masked=bool(self.masked) and all(self.masked),
            padding=max(self.padding) if self.padding else None,
            padding_shift=max(self.padding_shift) if self.padding_shift else None,
            eps=self.eps,
            offset=offset_of(module),
            momentum=float(momentum) if isinstance(momentum, (int, float)) else None,
            noise=self.noise,
            needed_eps=self.needed_eps,
            largest=self.largest,
            gain=None if gain is None else distribution(gain),
            bias=None if bias is None else distribution(bias),
            gain_gradient=gain_gradient,
            dead_gains=dead_gains(gain),
            removes_bias_of=feeding.pop() if len(feeding) == 1 else None,
            inside_recurrence=self.inside_recurrence,
            segments=bool(self.segmented) and all(self.segmented),
            running=self._running(),
        )

    def _running(self) -> Running | None:
        if self.before is None:
            return None
        mean, var = (t.detach().double().cpu() for t in self.before)
        bad = ~torch.isfinite(mean) | ~torch.isfinite(var) | (var < 0)
        distances, ratios = torch.zeros(0), torch.zeros(0)
        if self.moments.count.dim() or self.moments.mean.dim():
            batch_var = self.moments.var
            distances = (mean - self.moments.mean).abs() / (batch_var + self.eps).sqrt()
            ratios = torch.log2((var.clamp(min=0) + self.eps) / (batch_var + self.eps))
        return Running(
            tracked=self.tracked,
            initial=bool((mean == 0).all()) and bool((var == 1).all()),
            nonfinite=int(bad.sum()),
            distance=distribution(distances),
            log_ratio=distribution(ratios),
            noise=1 / math.sqrt(max(1, self.total_samples)),
            moves=self.moves,
        )


def dead_gains(gain: Tensor | None) -> list[int]:
    """Indices of gains next to nothing beside the median one. All zero they are a start (Goyal et al. 2017)."""
    if gain is None or not gain.numel() or not bool((gain != 0).any()):
        return []
    size = gain.detach().abs().flatten()
    reference = size.median() if bool(size.median() > 0) else size.max()
    return torch.nonzero(size <= DEAD_GAIN * reference).flatten().tolist()[:256]


def _rows_of_a_segment(segments: Any, within: Tensor | None) -> int:
    """How many valid rows the median segment has. `within`: (C, R), which elements count."""
    numbers = torch.as_tensor(segments).flatten()
    if within is not None:
        numbers = numbers[within.any(0).to(numbers.device)]
    return int(torch.unique(numbers, return_counts=True)[1].median())


def _positions(x: Tensor, valid: Valid) -> Tensor | None:
    """`valid` for the positions of a norm's input (N, C, L) or (N * T, C), in the order of `by_axis(x, 1)`."""
    samples, steps = valid.mask.shape
    if x.dim() == 3 and len(x) == samples:
        length = x.shape[2]
        stride = round(steps / length)
        # Convolutions without padding lose a few positions at the ends.
        if stride >= 1 and 0 <= math.ceil(steps / stride) - length <= max(0, length // 8):
            return valid.mask[:, ::stride][:, :length]
    if x.dim() == 2 and len(x) == samples * steps and steps > 1:
        return valid.mask if valid.samples_first else valid.mask.T
    return None
