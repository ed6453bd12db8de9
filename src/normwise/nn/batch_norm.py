"""BatchNorm1d, BatchNorm2d, BatchNorm3d."""

from __future__ import annotations

import warnings
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from normwise.backends.activations import activation
from normwise.backends.scalars import flags
from normwise.nn.construct import Activated, affine, affine_without_bias, reset_affine
from normwise.nn.skipped import CountsSkipped
from normwise.ops import dispatch, hyperparameters, symbolic
from normwise.ops.distributed import StatsGroup
from normwise.ops.norm import running_stats
from normwise.ops.norm.batch_norm_with_stats import batch_norm_with_stats
from normwise.ops.norm.domains import one_for_all
from normwise.ops.norm.running_stats import Updated
from normwise.words import counted

Layer = TypeVar("Layer", bound="_BatchNorm")


class _BatchNorm(CountsSkipped, Activated, nn.modules.batchnorm._BatchNorm):
    """The part of BatchNorm that does not depend on the input's rank.

    A subclass of torch's own, so that code that looks for BatchNorm layers (weight averaging, optimizer groups,
    conversion) finds these too.
    """

    ranks: tuple[int, ...]
    _warned_of_skipped = False
    _stats_group: StatsGroup | None = None  # the ranks that share statistics in training
    # Of layers pickled by earlier versions.
    dim, correction = 1, 1
    domains: int | None = None
    domain_affine = False

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
        virtual_batch_size: int | None = None,
        dim: int = 1,
        correction: int = 1,
        domains: int | None = None,
        domain_affine: bool = False,
    ) -> None:
        num_features = hyperparameters.size("num_features", num_features)
        hyperparameters.positive_eps(eps)
        hyperparameters.momentum_range(momentum)
        flags(affine=affine, track_running_stats=track_running_stats, bias=bias, domain_affine=domain_affine)
        if act is not None:
            activation(act)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        affine_without_bias(self, affine and not bias)
        self.act = act
        self.dim, self.correction = hyperparameters.channel_dim(dim), hyperparameters.correction(correction)
        if virtual_batch_size is not None:
            virtual_batch_size = hyperparameters.whole_number("virtual_batch_size", virtual_batch_size)
        if virtual_batch_size is not None and virtual_batch_size < 1:
            raise ValueError(
                f"virtual_batch_size must be at least 1, or None for the whole batch, but got {virtual_batch_size}"
            )
        self.virtual_batch_size = virtual_batch_size
        if domains is not None:
            self.spread(domains, domain_affine)
        elif domain_affine:
            raise ValueError("domain_affine=True gives each domain a gain and bias: say how many there are by domains=")
        self._skipped_count()

    def spread(self, domains: int, affine: bool = False) -> None:
        """Statistics, and with `affine` gain and bias, of so many domains instead of one, all as the one is now."""
        domains = hyperparameters.whole_number("domains", domains)
        if domains < 1:
            raise ValueError(f"domains must be at least 1, or None for one set of statistics, but got {domains}")
        self.domains, self.domain_affine = domains, affine
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            if (one := self._buffers.get(name)) is not None:
                self._buffers[name] = one.detach().expand(domains, *one.shape).clone()
        for name in ("weight", "bias") if affine else ():
            if (one := self._parameters.get(name)) is not None:
                spread = nn.Parameter(one.detach().expand(domains, *one.shape).clone(), one.requires_grad)
                self.register_parameter(name, spread)

    def _of_domain(self, domain: Any, *tensors: Tensor | None) -> tuple[tuple[Tensor | None, ...], Any]:
        """Statistics, gain and bias of one domain, and None; or all of them and the domain of each sample."""
        if self.domains is None:
            raise ValueError(
                f"got domain={domain!r}, but the layer has one set of statistics: build it with domains=, or convert "
                "the model by normwise.convert(model, to='batch', domains=...)"
            )
        if domain is None:
            raise ValueError(
                f"the layer has the statistics of {counted(self.domains, 'domain')}: say by domain= which one the "
                "batch belongs to, a number or one for each sample"
            )
        domain = one_for_all(domain)
        if not isinstance(domain, int | torch.SymInt):
            return tensors, domain
        if not 0 <= domain < self.domains:
            raise ValueError(f"domain must lie in [0, {self.domains}), but got {domain}")
        of_all = (False, False, False, not self.domain_affine, not self.domain_affine)
        return tuple(t if t is None or all_ else t[domain] for t, all_ in zip(tensors, of_all, strict=True)), None

    def reset_parameters(self) -> None:
        """Gain 1, bias 0, running mean 0 and variance 1."""
        self.reset_running_stats()
        reset_affine(self)

    def reset_running_stats(self) -> None:
        """Running mean 0 and variance 1, no batch tracked or skipped."""
        super().reset_running_stats()
        self._reset_skipped()
        self._warned_of_skipped = False

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
        """act(bn(input) + residual); see `normwise.functional.batch_norm` for shapes and errors.

        `act` here is for this call, in the place of the layer's.
        """
        if symbolic.is_traced(input, mask, lengths, residual, segments, domain) or (
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
            given["domain"] = domain
            return symbolic.call_layer(self, input, **given)
        training = self.training
        mean, var, tracked = self._running_stats()
        weight, bias = affine(self)
        if domain is not None or self.domains is not None:
            (mean, var, tracked, weight, bias), domain = self._of_domain(domain, mean, var, tracked, weight, bias)
        y, updated = batch_norm_with_stats(
            input,
            mean,
            var,
            weight,
            bias,
            training,
            self._momentum(tracked) if training and mean is not None else 0.0,
            self.__dict__["eps"],
            num_batches_tracked=tracked,
            mask=mask,
            lengths=lengths,
            act=self.act if act is None else act,
            residual=residual,
            process_group=self._stats_group,
            virtual_batch_size=self.virtual_batch_size,
            ranks=self.ranks,
            segments=segments,
            dim=self.dim,
            correction=self.correction,
            domain=domain,  # type: ignore[arg-type]
            domains=self.domains or 0,
            scale=scale,
            shift=shift,
        )
        if updated is not True:
            self._count_skipped(updated)
        return y

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """As in torch.nn; where statistics of one domain do not fit those of several, the errors say what does."""
        messages: list[str] = args[-1]
        before = len(messages)
        super()._load_from_state_dict(state_dict, prefix, *args)
        mean = state_dict.get(prefix + "running_mean")
        if self.domains is None or len(messages) == before or getattr(mean, "shape", None) != (self.num_features,):
            return
        messages.append(
            f"{prefix[:-1] or 'the layer'} has the statistics of {counted(self.domains, 'domain')}, the state_dict "
            "those of one: load it into a layer without domains=, and give each domain these by "
            f"normwise.convert(model, to='batch', domains={self.domains})"
        )

    def _running_stats(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Running mean and variance and the count of batches, where this call uses or updates them."""
        buffers = self.__dict__["_buffers"]
        mean, var, tracked = (buffers.get(name) for name in ("running_mean", "running_var", "num_batches_tracked"))
        return (mean, var, tracked) if self.track_running_stats or not self.training else (None, None, None)

    def _count_skipped(self, updated: Updated) -> None:
        """Count a batch whose statistics were not finite."""
        if updated is False:
            self._add_skipped(1)
            self._warn_of_skipped()
        elif (
            isinstance(updated, Tensor) and not dispatch.is_transforming()
        ):  # a count of its own for each copy of the layer has no place
            self._add_skipped_unless(updated)

    def _warn_of_skipped(self) -> None:
        if self._warned_of_skipped:
            return
        self._warned_of_skipped = True
        warnings.warn(
            f"{type(self).__name__} skipped an update of its running averages: the batch mean or variance of a channel "
            "was NaN or infinite. The output in training is not finite either: look for the cause in the input "
            "(torch.isfinite(x).all()), an overflow of float16 (train in bfloat16) or a learning rate that is too "
            "large. Further batches are only counted, in .num_batches_skipped",
            stacklevel=6,  # the call of the layer
        )

    def train(self: Layer, mode: bool = True) -> Layer:
        """As in torch.nn. Warns of skipped batches where no warning could be given earlier (on a GPU, compiled)."""
        if not mode and self.training and not self._warned_of_skipped:
            self._count_flags()
            skipped = self._skipped
            if skipped is not None and running_stats.can_read(skipped) and skipped.item() > 0:
                self._warn_of_skipped()
        return super().train(mode)

    def _momentum(self, tracked: Tensor | None = None) -> float | None:
        """The weight of the next batch: `momentum`, or that of a cumulative average; None where ops have to take it
        from the count, whose value is not known while compiling, another when a traced graph runs, and on a GPU not
        yet there. `tracked`: the count, if not the layer's."""
        if self.momentum is not None:
            return self.momentum
        tracked = self.num_batches_tracked if tracked is None else tracked
        if tracked is None or self.running_mean is None:
            return 0.0
        if tracked.dim() or not running_stats.can_read_now(tracked):
            return None
        return 1.0 / (int(tracked) + 1)

    def extra_repr(self) -> str:
        act = "" if self.act is None else f", act={self.act!r}"
        ghosts = "" if self.virtual_batch_size is None else f", virtual_batch_size={self.virtual_batch_size}"
        dim = "" if self.dim == 1 else f", dim={self.dim}"
        correction = "" if self.correction == 1 else f", correction={self.correction}"
        domains = "" if self.domains is None else f", domains={self.domains}"
        domains += ", domain_affine=True" if self.domain_affine else ""
        return str(super().extra_repr()) + act + ghosts + dim + correction + domains


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    r"""Batch normalization of (N, C), (N, C, L), a PackedSequence or a jagged nested tensor.

    y = act(gamma * (x - E[x]) / sqrt(Var[x] + eps) + beta + residual), with mean and variance of each of the
    `num_features` channels over the batch (and its steps) in training, and their running averages in evaluation.
    The running averages are updated by `momentum`: running = (1 - momentum) * running + momentum * batch. A batch in
    which the mean or variance of a channel is NaN or infinite skips the update: it counts in `num_batches_skipped` (a
    tensor that is no buffer) instead of `num_batches_tracked`, and the first one raises a warning. A forward that
    activation checkpointing repeats inside the backward does not update them a second time.

    A drop-in for `torch.nn.BatchNorm1d`: same arguments, state_dict and results. Beyond it, in the call: `mask`
    (bool, True = valid; (N, L), or broadcastable to the input) or `lengths` (valid steps of each sample) keep padding
    out of the statistics, `residual` is added before `act`, `segments` (R,) makes a batch of each of the graphs or
    clouds whose rows (R, C) come together, and `scale` and `shift` (N, C) go with the sample (conditional BatchNorm).

    Pitfall: with one value per channel in training there is no deviation, and with few the statistics are noisy: at
    small batches prefer LayerNorm or GroupNorm.

    Args:
        num_features: C.
        eps: added to the variance.
        momentum: weight of the new batch in the running averages; None for a cumulative average.
        affine: learn gamma and beta.
        track_running_stats: keep running averages; without them evaluation uses the batch's statistics too.
        bias: learn beta.
        act: "relu", "leaky_relu", "silu", "gelu", "relu6", "hardswish", "hardsigmoid", "elu", "gelu_tanh", "softplus",
            "mish" or None.
        virtual_batch_size: ghost batch norm: in training each run of this many samples has its own statistics; the
            last one is smaller if the batch size is no multiple (merged with the one before if it would hold one value
            per channel). Running averages are still those of the whole batch.
        dim: the axis of the channels, e.g. -1 for (N, L, C).
        correction: the running variance divides by count - correction: 1 as in torch, 0 as in Keras and Flax.
        domains: the number of domains, each with running statistics and a batch count of its own, (domains, C); a call
            then names its domain by `domain=`: a number, or (N,) one for each sample. In training a sample is
            normalized with the others of its domain.
        domain_affine: a gain and bias for each domain too.

    Source: Ioffe & Szegedy 2015; Hoffer, Hubara & Soudry 2017 for virtual batches; Chang et al. 2019 for domains.
    """

    ranks = (2, 3)


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    """Batch normalization of (N, C, H, W); as `BatchNorm1d`, with `mask` of shape (N, H, W)."""

    ranks = (4,)


class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    """Batch normalization of (N, C, D, H, W); as `BatchNorm1d`, with `mask` of shape (N, D, H, W)."""

    ranks = (5,)
