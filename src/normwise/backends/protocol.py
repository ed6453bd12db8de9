"""What a backend is, and the one form in which it gets a call.

A backend has norms and recurrences. Each says whether it `supports` a request (None, or the reason why not, in words
that `BackendError` and `normwise info` show), and runs it `forward` and `backward`. `normwise.ops` checks the user's
arguments, brings them into the form below and chooses the backend; backends do not know each other.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from normwise.backends.recurrence import Recurrence, Weights

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
        momentum: weight of this batch in the running statistics; None for that of a cumulative average, which is
            1 / (num_batches_tracked + 1).
        as_written: RMSNorm by the operations that models write out, one after the other, for their very bits.
    """

    op: str
    family: Family
    eps: float
    act: str | None = None
    axes: int = 1
    groups: int = 1
    center: bool = True
    batch_statistics: bool = True
    momentum: float | Tensor | None = 0.0
    as_written: bool = False


def momentum_now(momentum: float | Tensor | None, num_batches_tracked: Tensor | None, dtype: torch.dtype) -> Any:
    """A momentum as a number or tensor, that of a cumulative average too, without a look at the count."""
    if momentum is not None:
        return momentum
    assert num_batches_tracked is not None
    return (num_batches_tracked + 1.0).to(dtype).reciprocal()  # 1.0, so that the sum is floating at once


class Gate(NamedTuple):
    """norm(x) * act(values), or norm(x * act(values)) with `first`.

    Attributes:
        values: like x.
        act: a name in `activations.GATES`; None for the values themselves.
    """

    values: Tensor
    act: str | None = "silu"
    first: bool = False


class NormRequest(NamedTuple):
    """One call of a norm.

    Attributes:
        config: the norm.
        x: the input.
        residual: like x, or None. Family "features" adds it before the statistics are taken, the others after the
            gain and bias.
        weight, bias: gain and bias: shape of the normalized axes for "features", else (C,). Of "features" those of a
            sample or position too, with as many axes as x, to which they broadcast, and of "channels" those of each
            sample, (N, C, 1, ...): what no ATen norm takes.
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

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All that a backend reads."""
        return self[1:]


class NormResult(NamedTuple):
    """What a forward gives.

    Attributes:
        y: like x, 0 where invalid.
        total: what the statistics are of: x + residual for "features", else x, in the layout that was computed on.
        stats: the mean and 1 / sqrt(var + eps) that were used: (2, n) float64, for the backward; of ATen two vectors.
        stats_updated: whether the running statistics were updated; None: not yet, they are to be moved by `moments`,
            or replaced by `new_running`.
        moments: those of the batch, one element a channel (for "groups" one a sample and channel).
        new_running: the next running mean and variance, two tensors or one of (2, C).
    """

    y: Tensor
    total: Tensor
    stats: Tensor | tuple[Tensor, Tensor] | None = None
    stats_updated: bool | Tensor | None = True
    moments: Moments | None = None
    new_running: Tensor | tuple[Tensor, Tensor] | None = None


class NormGradients(NamedTuple):
    """Of x, residual, weight, bias and the values of a gate; None where there is none."""

    x: Tensor
    residual: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    gate: Tensor | None = None


class NormFamily(NamedTuple):
    """How a backend computes one family.

    forward(*request, needs_grad) -> NormResult; `needs_grad`: a backward may follow.
    backward(config, total, residual, weight, bias, mask, stats, dy, dtotal) -> NormGradients; None where `forward`
    consists of torch's operations, which autograd differentiates by itself.
    supports_gate(config, x, gate) -> None, or why not: where both also take a last argument, a `Gate`. None where they
    do not.
    """

    forward: Callable[..., NormResult]
    backward: Callable[..., NormGradients] | None = None
    supports_gate: Callable[[NormConfig, Tensor, Gate], str | None] | None = None


class RunningStatsRequest(NamedTuple):
    """One update of the running averages of a BatchNorm, or an InstanceNorm, by what a batch had, on a device.

    running <- running + momentum * (batch - running), with the variance unbiased, and the batch counted. A channel
    without an element keeps its averages, and one with a single element its variance. If anything would become NaN or
    infinite, nothing changes.

    Attributes:
        running_mean, running_var: (C,) float, updated in place.
        num_batches_tracked: 0-d int64, updated in place, or None.
        momentum: see `NormConfig`.
        mean, var, count: (C,) of the batch, the variance biased; the count of each channel, or one for all. For
            "update_over_samples" (N, C), of each sample: the average over those that have moments moves each average,
            and nothing is counted.
        rstd, eps: where there is no `var`: 1 / sqrt(var + eps), which norms save for their backward.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor | None
    momentum: float | Tensor | None
    mean: Tensor | None = None
    var: Tensor | None = None
    count: Tensor | int = 0  # type: ignore[assignment]  # hides tuple.count, which nobody needs here
    rstd: Tensor | None = None
    eps: float = 0.0

    @property
    def x(self) -> Tensor:
        """What says where the request is."""
        return self.running_mean

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All that a backend reads."""
        return tuple(t if isinstance(t, Tensor) else None for t in self)


class LengthsRequest(NamedTuple):
    """Which of `steps` steps each sample has, by `lengths`, (samples,) integers on a device."""

    lengths: Tensor
    steps: int

    @property
    def x(self) -> Tensor:
        """What says where the request is."""
        return self.lengths

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that a backend reads."""
        return (self.lengths,)


# For each normalized site, tables (rows, features) of running mean and variance; step t reads row min(t, rows - 1).
Running = dict[str, tuple[Tensor, Tensor]]


class Layout(NamedTuple):
    """Where the rows of a batch of sequences lie, one a step and sample; in x, in outputs and in flags alike.

    Dense, (steps, batch, ...): every sequence has all steps. Packed, (rows, ...) as in torch's PackedSequence, longest
    sequence first, where there are `batch_sizes`. Padded, (steps, batch, ...), where there are `lengths`: their values
    cannot be looked at, inside torch.compile or torch.func.

    Attributes:
        steps: of the longest sequence.
        batch: samples, those without a step included.
        batch_sizes: (steps,) int64 on the CPU, falling: how many samples have that step.
        flip: (rows,) int64, packed in two directions: for each row the one that takes its place when every sequence is
            turned round. Its own inverse.
        lengths: (batch,) int64, on the device of the rows.
        lengths_on_cpu: the same where they were given on the CPU: known before the rows are computed.
        visible: whether values of flags may be looked at.
    """

    steps: int
    batch: int
    batch_sizes: Tensor | None = None
    flip: Tensor | None = None
    lengths: Tensor | None = None
    visible: bool = True
    lengths_on_cpu: Tensor | None = None


class RecurrenceRequest(NamedTuple):
    """One call of a stack of recurrent layers, each in one or both directions.

    Attributes:
        config: the recurrence, the same for all.
        x: the input, in rows of I features; see `layout`.
        h0, c0: (L * D, batch, H) initial states, layer by layer, forward before backward. `c0`: an LSTM's.
        weights: of each layer and direction, in the same order.
        layout: where the rows of x lie.
        resets: for the forward and the backward direction flags laid out as the rows, bool: True where the state is
            zeroed before that row is computed.
        running: batch norm's tables for each of `weights`; None takes the batch's statistics.
        start_step: the index of the first step in these tables.
        bidirectional: D = 2.
        dropout: probability of an element to be zeroed between layers, in training.
        training: dropout and zoneout draw.
        is_cell: the one step of a cell, for which torch has kernels of its own.
        autocast: the dtype in which torch.autocast wants matrices multiplied: x, states and matrices come to layers in
            it. torch's own kernels see to it themselves.
    """

    config: Recurrence
    x: Tensor
    h0: Tensor
    c0: Tensor | None
    weights: tuple[Weights, ...]
    layout: Layout
    resets: tuple[Tensor | None, Tensor | None] = (None, None)
    running: tuple[Running, ...] | None = None
    start_step: int = 0
    bidirectional: bool = False
    dropout: float = 0.0
    training: bool = False
    is_cell: bool = False
    autocast: torch.dtype | None = None

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All that a backend reads."""
        tables = () if self.running is None else [t for of in self.running for pair in of.values() for t in pair]
        return self.x, self.h0, self.c0, *self.resets, *[w for layer in self.weights for w in layer], *tables


class RecurrenceResult(NamedTuple):
    """What a stack gives: rows as those of x, (L * D, batch, H) final states, and for each layer and direction the
    batch moments by site."""

    output: Tensor
    h: Tensor
    c: Tensor | None
    statistics: list[dict[str, Moments]]


class LayerRequest(NamedTuple):
    """One layer in one direction of a `RecurrenceRequest`.

    Attributes:
        x, h0, c0, weights, layout, reset, running, start_step: as there, of this layer and direction; states are
            (batch, H).
        reverse: run from the last step to the first.
        zoneout_mask: bool, laid out as the rows, (..., H): True where zoneout keeps the previous h; None takes
            zoneout's expectation.
    """

    config: Recurrence
    x: Tensor
    h0: Tensor
    c0: Tensor | None
    weights: Weights
    layout: Layout
    reverse: bool = False
    reset: Tensor | None = None
    zoneout_mask: Tensor | None = None
    running: Running | None = None
    start_step: int = 0


class LayerResult(NamedTuple):
    """What a layer gives in one direction.

    Attributes:
        output: h of each row; padding is 0. No view of another tensor.
        h, c: (batch, H) the state after each sequence's last step; `c` is None without a cell state.
        statistics: batch norm by the batch's statistics: for each site the moments that were used, (steps, features) or
            (1, features) for sequence-wise statistics, with `count` (steps, 1) or (1, 1); steps are in the order of
            processing. Else empty.
        saved: what `backward` wants again.
    """

    output: Tensor
    h: Tensor
    c: Tensor | None
    statistics: dict[str, Moments]
    saved: tuple[Tensor | None, ...] = ()


class Saved(NamedTuple):
    """One tensor of `LayerResult.saved`: (rows of x, columns); None where there are no columns.

    `is_output`: that of the rows that the caller gets, in the order of processing, which may be the very same tensor.
    """

    columns: int
    dtype: torch.dtype
    is_output: bool = False


class LayerKernel(NamedTuple):
    """How a backend computes one layer in one direction.

    forward(request, needs_grad) -> LayerResult; `needs_grad`: a backward may follow.
    backward(request, saved, (doutput, dh, dc), needs) -> gradients of (x, h0, c0, *weights), None where there is none;
    `needs` says which of these are wanted. None where `forward` consists of torch's operations.
    saves(config, inputs, units, dtype) -> what `saved` holds for x of `dtype`, one `Saved` for each tensor: a compiler
    plans with it before anything has run, and knows neither how many rows there will be nor whether a backend's library
    is here. None where there is no `backward`.
    """

    forward: Callable[[LayerRequest, bool], LayerResult]
    backward: Callable[..., list[Tensor | None]] | None = None
    saves: Callable[[Recurrence, int, int, torch.dtype], tuple[Saved, ...]] | None = None


class StackKernel(NamedTuple):
    """How a backend computes a whole stack at once, where it `supports` the request (None, or why not)."""

    supports: Callable[[RecurrenceRequest], str | None]
    forward: Callable[[RecurrenceRequest], RecurrenceResult]


class Operation(NamedTuple):
    """One kind of operation, norm or recurrence, of one backend.

    kernels: of norms one a family; of recurrences "layer" and, where there is one, "stack".
    supports(request): None, or why the backend cannot run it.
    shortcoming(request, may_look): None, or what it would do less well than promised; `may_look`: at the values.
    """

    supports: Callable[[Any], str | None]
    shortcoming: Callable[[Any, bool], str | None]
    kernels: Mapping[str, Any]


class Backend(NamedTuple):
    """A provider of norms and recurrences. `missing()`: why it cannot be used on this machine, or None.

    running_stats: updates of running averages in one launch, "update"(RunningStatsRequest) -> 0-d bool tensor, whether
    they took place; None where the norms do it or leave it to torch's operations.
    lengths: "mask"(LengthsRequest) -> (samples, steps) bool, True where there is a step, in one launch.
    """

    name: str
    missing: Callable[[], str | None]
    norm: Operation
    recurrence: Operation
    running_stats: Operation | None = None
    lengths: Operation | None = None


def supports_all(request: Any) -> str | None:
    """For a backend that runs everything."""
    return None


def no_shortcoming(request: Any, may_look: bool) -> str | None:
    """For a backend that keeps every promise."""
    return None
