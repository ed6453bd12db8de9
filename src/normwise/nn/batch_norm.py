"""BatchNorm1d, BatchNorm2d, BatchNorm3d."""

from __future__ import annotations

import warnings
from collections import deque
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from normwise.nn.construct import Activated, affine_without_bias, eps_of, reset_affine
from normwise.nn.recall import Recall
from normwise.nn.skipped import CountsSkipped
from normwise.ops import check, choose, plain, ragged, running, symbolic
from normwise.ops.batch_norm import batch_norm_moved
from normwise.ops.ghost_batch_norm import ghost_batch_norm_moved
from normwise.ops.ranks import Peers
from normwise.ops.recent_batch_norm import recent_batch_norm_moved
from normwise.ops.running import Moved
from normwise.reference import Moments, activation

Layer = TypeVar("Layer", bound="_BatchNorm")


class _BatchNorm(CountsSkipped, Activated, nn.modules.batchnorm._BatchNorm):
    """The part of BatchNorm that does not depend on the input's rank.

    A subclass of torch's own, so that code that looks for BatchNorm layers (weight averaging, optimizer groups,
    conversion) finds these too. A norm that takes its statistics from elsewhere overrides `_normalize` alone.
    """

    ranks: tuple[int, ...]
    _said_skipped = False
    _peers: Peers | None = None  # the ranks that share statistics in training
    _by_batch = True  # `_normalize` is that of BatchNorm

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
        accumulate: int | None = None,
    ) -> None:
        num_features = check.whole_number("num_features", num_features)
        check.positive_eps(eps)
        check.momentum_range(momentum)
        if act is not None:
            activation(act)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        affine_without_bias(self, affine and not bias)
        self.act = act
        if virtual_batch_size is not None:
            virtual_batch_size = check.whole_number("virtual_batch_size", virtual_batch_size)
        if accumulate is not None:
            accumulate = check.whole_number("accumulate", accumulate)
        if virtual_batch_size is not None and virtual_batch_size < 1:
            raise ValueError(
                f"virtual_batch_size must be at least 1, or None for the whole batch, but got {virtual_batch_size}"
            )
        if accumulate is not None and accumulate < 1:
            raise ValueError(
                f"accumulate must be at least 1, the number of micro-batches of an optimizer step, but got {accumulate}"
            )
        if accumulate is not None and virtual_batch_size is not None:
            raise ValueError(
                "got accumulate, for more than a batch, and virtual_batch_size, for less: give one of them"
            )
        self.virtual_batch_size = virtual_batch_size
        self.accumulate = accumulate
        self._recent: deque[Moments] = deque(maxlen=0 if accumulate is None else accumulate - 1)
        self._earlier_of: Recall[list[Moments]] = Recall()
        self._place_skipped()

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls._by_batch = cls._normalize is _BatchNorm._normalize

    def reset_parameters(self) -> None:
        """Gain 1, bias 0, running mean 0 and variance 1."""
        self.reset_running_stats()
        reset_affine(self)

    def reset_running_stats(self) -> None:
        """Running mean 0 and variance 1, no batch tracked or skipped."""
        super().reset_running_stats()
        self._forget_skipped()
        self._said_skipped = False
        if hasattr(self, "_recent"):
            self._recent.clear()

    def forward(
        self,
        input: Tensor | PackedSequence,
        *,
        mask: Tensor | None = None,
        lengths: Tensor | None = None,
        residual: Tensor | PackedSequence | None = None,
    ) -> Any:
        """act(bn(input) + residual); see `normwise.functional.batch_norm` for shapes and errors."""
        learns = self.training and self.track_running_stats
        if mask is None and lengths is None and residual is None and choose.plain(input):
            done = self._plainly(input)  # type: ignore[arg-type]
            if done is not None:
                y, moved = done
                if learns and not moved:  # the kernel counts a batch whose averages it moves
                    self._count(moved)
                return y
        if symbolic.is_traced(input, mask, lengths, residual):
            return symbolic.call_layer(self, input, mask=mask, lengths=lengths, residual=residual)
        ragged.rank_or_rows(input, self.ranks, type(self).__name__, "BatchNorm1d")
        mean, var = (None, None) if self.training and not learns else (self.running_mean, self.running_var)
        if learns and mean is not None and var is not None and running.recomputing():
            learns, mean, var = False, mean.clone(), var.clone()  # clones: it must run as it ran the first time
        momentum = self._momentum() if self.training and mean is not None else 0.0
        y, moved = self._normalize(input, mean, var, momentum, mask=mask, lengths=lengths, residual=residual)
        if learns:
            # After the op, so that a refused input is not counted.
            self._count(moved)
        return y

    def _plainly(self, x: Tensor) -> tuple[Any, Moved] | None:
        """The output, and whether the running averages moved, by the shortest way; None where it is not as simple."""
        own = self.__dict__  # asking the module for one of its tensors takes as long as all the rest
        learnt, kept, training = own["_parameters"], own["_buffers"], own["training"]
        if (
            own["act"] is not None
            or self._peers is not None
            or not own["track_running_stats"]
            or not self._by_batch
            or "_normalize" in own  # put there by whoever stands in for it
            or x.dim() not in self.ranks
            or (training and (own["virtual_batch_size"] or own["accumulate"] or running.in_backward()))
        ):
            return None
        try:
            mean, var, tracked = kept["running_mean"], kept["running_var"], kept["num_batches_tracked"]
            weight, bias = learnt["weight"], learnt["bias"]
        except KeyError:  # parametrized, say
            return None
        momentum = own["momentum"] if training else 0.0
        return plain.batch_norm(x, mean, var, weight, bias, training, momentum, own["eps"], tracked)

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
        """The output, and whether the running averages moved: in training statistics come from this batch."""
        if self.training and (self.virtual_batch_size or self.accumulate) and choose.jit_traces():
            raise RuntimeError(
                f"torch.jit.trace cannot follow {type(self).__name__} in training with virtual_batch_size= or "
                "accumulate=, which go by the sizes and statistics of each batch: trace it in eval mode, or use "
                "torch.compile"
            )
        if self.training and self.virtual_batch_size is not None:
            if ragged.is_ragged(input) or ragged.is_ragged(residual):
                raise ValueError(
                    f"virtual_batch_size={self.virtual_batch_size} counts samples, which rows of a ragged input do not "
                    "tell apart: give a padded input with lengths="
                )
            assert isinstance(input, Tensor)
            assert residual is None or isinstance(residual, Tensor)
            return ghost_batch_norm_moved(
                input,
                running_mean,
                running_var,
                self.weight,
                self.bias,
                momentum,
                eps_of(self),
                self.virtual_batch_size,
                mask=mask,
                lengths=lengths,
                act=self.act,
                residual=residual,
            )
        if self.training and self.accumulate is not None:
            return recent_batch_norm_moved(
                input,
                running_mean,
                running_var,
                self.weight,
                self.bias,
                momentum,
                eps_of(self),
                self._earlier,
                first=len(self._recent) == 0,
                mask=mask,
                lengths=lengths,
                act=self.act,
                residual=residual,
            )
        return batch_norm_moved(
            input,
            running_mean,
            running_var,
            self.weight,
            self.bias,
            self.training,
            momentum,
            eps_of(self),
            mask=mask,
            lengths=lengths,
            act=self.act,
            residual=residual,
            process_group=self._peers,
        )

    def _earlier(self, own: Moments) -> list[Moments]:
        """The moments of the micro-batches before this one, which joins them if it is finite."""
        if running.recomputing():
            return self._earlier_of.find(own.mean, type(self).__name__)
        earlier = list(self._recent)
        self._earlier_of.keep(own.mean, earlier)
        finite = ((own.mean * 0 + own.var * 0) == 0).all()
        self._recent.append(Moments(*(torch.where(finite, m, 0) for m in own)))
        return earlier

    def _count(self, moved: Moved) -> None:
        """One batch more, tracked or, where its statistics were not finite, skipped."""
        tracked = self._buffers.get("num_batches_tracked")
        if moved is True:  # looked at first: it is nearly always so
            if tracked is not None:
                tracked.add_(1)
            return
        if tracked is None:
            return
        if moved is False:
            self._skip(1)
            self._say_skipped()
        else:
            tracked.add_(moved)
            if not choose.transforming():  # a count of its own for each copy of the layer has no place
                self._skip(~moved)

    def _say_skipped(self) -> None:
        if self._said_skipped:
            return
        self._said_skipped = True
        warnings.warn(
            f"{type(self).__name__} left a batch out of its running averages: the mean or variance of a channel was "
            "NaN or infinite, and evaluation would have been so ever after. Its output in training is not finite "
            "either: look for the cause in the input (torch.isfinite(x).all()), an overflow of float16 (train in "
            "bfloat16) or a learning rate that is too large. Further batches are only counted, in "
            ".num_batches_skipped",
            stacklevel=6,  # the call of the layer
        )

    def train(self: Layer, mode: bool = True) -> Layer:
        """As in torch.nn. Says if batches were skipped where no warning could be given at once (on a GPU, compiled)."""
        if not mode and self.training and not self._said_skipped:
            skipped = self._skipped
            if skipped is not None and running.may_read(skipped) and skipped.item() > 0:
                self._say_skipped()
        return super().train(mode)

    def _momentum(self) -> float | Tensor:
        """The weight of the next batch: `momentum`, or that of a cumulative average."""
        if self.momentum is not None:
            return self.momentum
        if self.num_batches_tracked is None or self.running_mean is None:
            return 0.0
        if torch.compiler.is_compiling() or choose.jit_traces():
            # The count stays a tensor: its value is not known while compiling, and another when a traced graph runs.
            return 1.0 / (self.num_batches_tracked + 1).to(self.running_mean.dtype)
        return 1.0 / (int(self.num_batches_tracked) + 1)

    def extra_repr(self) -> str:
        act = "" if self.act is None else f", act={self.act!r}"
        ghosts = "" if self.virtual_batch_size is None else f", virtual_batch_size={self.virtual_batch_size}"
        recent = "" if self.accumulate is None else f", accumulate={self.accumulate}"
        return str(super().extra_repr()) + act + ghosts + recent


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    r"""Batch normalization of (N, C), (N, C, L), a PackedSequence or a jagged nested tensor.

    y = act(gamma * (x - E[x]) / sqrt(Var[x] + eps) + beta + residual), with mean and variance of each of the
    `num_features` channels over the batch (and its steps) in training, and their running averages in evaluation.
    The running averages move by `momentum`: running = (1 - momentum) * running + momentum * batch. A batch with a
    channel whose mean or variance is NaN or infinite is left out of them: it counts in `num_batches_skipped` (a tensor
    that is no buffer) instead of `num_batches_tracked`, and the first one is warned of. A forward that activation
    checkpointing runs again inside the backward does not move them a second time.

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
        virtual_batch_size: ghost batch norm: in training each run of this many samples has its own statistics; the
            last one is smaller where the batch is no multiple (joined to the one before if it would hold one value a
            channel). Running averages are still those of the whole batch.
        accumulate: for gradient accumulation over this many micro-batches: in training the statistics are those of the
            present and the last `accumulate - 1` forwards together. An approximation: earlier ones were taken with the
            weights of their time and are constants for the gradient. `normwise.accumulated_backward` is exact.

    Source: Ioffe & Szegedy 2015; Hoffer, Hubara & Soudry 2017 for virtual batches.
    """

    ranks = (2, 3)


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    """Batch normalization of (N, C, H, W); as `BatchNorm1d`, with `mask` of shape (N, H, W)."""

    ranks = (4,)


class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    """Batch normalization of (N, C, D, H, W); as `BatchNorm1d`, with `mask` of shape (N, D, H, W)."""

    ranks = (5,)
