"""What a backend is, and the one form in which it gets a call.

A backend has norms and recurrences. Each says whether it `supports` a request (None, or the reason why not, in words
that `BackendError` and `normwise info` show), and runs it `forward` and `backward`. `normwise.ops` checks the user's
arguments, brings them into the form below and chooses the backend; backends do not know each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Family = Literal["features", "groups", "channels"]


class Moments(NamedTuple):
    """Statistics of a tensor over some of its axes, which are kept with size 1.

    `var` is biased (divided by `count`). `count` is how many elements entered; where it is 0, so are `mean` and `var`.
    """

    mean: Tensor
    var: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count, which nobody needs here


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that statistics of `dtype` are computed and kept in: at least float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class NormConfig(NamedTuple):
    """A norm without its tensors.

    Attributes:
        op: its name in `normwise.functional`, for messages.
        family: which axes share statistics: "features", the last `axes` of x; "groups", the positions and the channels
            of one of `groups` groups of a sample (N, C, ...); "channels", all axes of (N, C, ...) but the second.
        eps: added to the variance.
        act: the activation that comes last, by its name; None for none.
        axes: see `family`.
        groups: see `family`.
        center: False leaves the mean in and divides by the root of the mean square (RMSNorm).
        batch_statistics: statistics are those of x; otherwise the running ones are used.
        momentum: weight of this batch in the running statistics.
    """

    op: str
    family: Family
    eps: float
    act: str | None = None
    axes: int = 1
    groups: int = 1
    center: bool = True
    batch_statistics: bool = True
    momentum: float | Tensor = 0.0


class NormRequest(NamedTuple):
    """One call of a norm.

    Attributes:
        config: the norm.
        x: the input.
        residual: like x, or None. Family "features" adds it before the statistics are taken, the others after the
            gain and bias.
        weight, bias: gain and bias: shape of the normalized axes for "features", else (C,).
        mask: bool, True = valid, with as many axes as x and broadcastable to it.
        running_mean, running_var: (C,) float; with `batch_statistics` they are updated in place.
        num_batches_tracked: 0-d int64, counts updates.
    """

    config: NormConfig
    x: Tensor
    residual: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    mask: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    num_batches_tracked: Tensor | None = None


class NormResult(NamedTuple):
    """What a forward gives.

    Attributes:
        y: like x, 0 where invalid.
        total: what the statistics are of: x + residual for "features", else x, in the layout that was computed on.
        stats: (2, n) float64: the mean and 1 / sqrt(var + eps) that were used, for the backward.
        stats_updated: whether the running statistics were updated; None: not yet, they are to be moved by `moments`,
            or replaced by `new_running`.
        moments: those of the batch, one element a channel (for "groups" one a sample and channel).
        new_running: the next running mean and variance.
    """

    y: Tensor
    total: Tensor
    stats: Tensor | None = None
    stats_updated: bool | Tensor | None = True
    moments: Moments | None = None
    new_running: tuple[Tensor, Tensor] | None = None


class NormGradients(NamedTuple):
    """Of x, residual, weight and bias; None where there is none."""

    x: Tensor
    residual: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class NormFamily(NamedTuple):
    """How a backend computes one family.

    forward(*request, needs_grad) -> NormResult; `needs_grad`: a backward may follow.
    backward(config, total, residual, weight, bias, mask, stats, dy, dtotal) -> NormGradients; None where `forward`
    consists of torch's operations, which autograd differentiates by itself.
    """

    forward: Callable[..., NormResult]
    backward: Callable[..., NormGradients] | None = None


class Operation(NamedTuple):
    """One kind of operation, norm or recurrence, of one backend.

    supports(request): None, or why the backend cannot run it.
    shortcoming(request, may_look): None, or what it would do less well than promised; `may_look`: at the values.
    """

    supports: Callable[[Any], str | None]
    shortcoming: Callable[[Any, bool], str | None]
    kernels: Mapping[str, Any]


class Backend(NamedTuple):
    """A provider of norms and recurrences. `missing()`: why it cannot be used on this machine, or None."""

    name: str
    missing: Callable[[], str | None]
    norm: Operation
    recurrence: Operation | None = None


def supports_all(request: Any) -> str | None:
    """For a backend that runs everything."""
    return None


def no_shortcoming(request: Any, may_look: bool) -> str | None:
    """For a backend that keeps every promise."""
    return None
