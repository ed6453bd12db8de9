"""Numbers about layers: norms, recurrent layers, and a layer as a whole."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from normwise.diagnosis.values import Activations, Distribution, Gradient, Units
from normwise.words import counted

Role = Literal["norm", "linear", "conv", "recurrent", "attention", "embedding", "nonlinearity", "dropout", "other"]


@dataclass(frozen=True)
class Running:
    """Running statistics against those of the batches that came by, channel by channel.

    Attributes:
        tracked: how many batches they have seen; None where nobody counts.
        initial: they are the 0 and 1 that they started from.
        nonfinite: channels whose running mean or variance is NaN, infinite or (variance) negative.
        distance: |running mean - batch mean| / batch deviation.
        log_ratio: log2((running var + eps) / (batch var + eps)).
        noise: how large the median `distance` would be by chance alone, the samples being so few.
        moves: they change when the model is called in train mode.
    """

    tracked: int | None
    initial: bool
    nonfinite: int
    distance: Distribution
    log_ratio: Distribution
    noise: float
    moves: bool


@dataclass(frozen=True)
class Norm:
    """A norm layer.

    Attributes:
        kind: "batch", "renorm", "instance", "layer", "group", "rms", or "frozen" for a FrozenBatchNorm.
        synchronized: its batch statistics are over all ranks.
        batch_statistics: in train mode they are taken over the batch.
        was_training: the layer was in train mode when the model was given.
        trainable: its gain or bias has `requires_grad`; None without these.
        values: the fewest values that one statistic came from, over all batches; with `segments=` those of a batch's
            median segment.
        samples: the fewest samples that entered; with `segments=` as `values`.
        lengths: the shortest and longest L among inputs (N, C, L).
        masked: every call came with a mask or lengths, or with ragged input.
        padding: share of the positions that are padding and enter the statistics nevertheless.
        padding_shift: how far that moves a channel's mean, in its deviations: the median over the channels.
        eps, momentum: its settings.
        offset: what is added to its weight for its gain.
        noise: what rounding of the input amounts to in the output, whose deviation is 1: the largest over those
            statistics whose variance is itself no more than rounding. 0 where there are none.
        needed_eps: an eps that would keep it below 1 %.
        largest: the largest number that it squares: |x| of an RMSNorm, else |x - mean|, where the mean is that of a
            statistic of this very input. None for norms over the batch, which square nothing in eval mode.
        gain, bias: distributions over the channels.
        gain_gradient: norm of the gain's gradient.
        dead_gains: indices of channels whose gain is next to nothing beside the median's.
        removes_bias_of: the layer whose output comes in as it is and whose bias this norm takes away again.
        inside_recurrence: its output goes into its own input at a later call of the same pass.
        segments: every call came with `segments=`.
        running: None without running statistics.
    """

    kind: str
    synchronized: bool
    batch_statistics: bool
    was_training: bool
    trainable: bool | None
    values: int | None
    samples: int | None
    lengths: list[int] | None
    masked: bool
    padding: float | None
    padding_shift: float | None
    eps: float
    offset: float
    momentum: float | None
    noise: float
    needed_eps: float
    largest: float | None
    gain: Distribution | None
    bias: Distribution | None
    gain_gradient: float | None
    dead_gains: list[int]
    removes_bias_of: str | None
    inside_recurrence: bool
    segments: bool
    running: Running | None


@dataclass(frozen=True, repr=False)
class Gate:
    """One gate of a recurrent layer: the share of its values beyond the threshold, over all and at each time step."""

    name: str
    threshold: float
    saturated: float
    over_time: list[float]

    def __repr__(self) -> str:
        beyond = f"{100 * self.saturated:.3g}% of its values beyond {self.threshold:g}"
        return f"<Gate {self.name!r}: {beyond}, over {counted(len(self.over_time), 'step')}; has .over_time>"


@dataclass(frozen=True, repr=False)
class Recurrence:
    """One layer in one direction of a recurrent module, recomputed step by step from its weights and inputs.

    Lists over time are in the order of processing: for a backward direction step 0 is each sequence's last. They end
    where fewer than five sequences, of all batches together, go on.

    Attributes:
        place: as torch ends the names of its parameters: "l0", "l0_reverse", "l1"; "cell" for a cell, whose calls of a
            pass are the steps.
        cell: "lstm", "gru", "rnn".
        norm: what is normalized inside: "layer", "rms", "batch", or None.
        shared_statistics: batch statistics, and one running estimate for all time steps.
        gates: in torch's order. A GRU's candidate and an RNN's unit count as gates here.
        summed: root mean square of the summed input, W x + W h + b after its norms, at each step.
        state: root mean square of h_t.
        gradient: norm of the gradient of the loss with respect to h_t, all paths into later steps included.
        error: how far the recomputed output is from the layer's own, at most, as a share of its largest value; None
            where dropout or zoneout draw.
    """

    place: str
    cell: str
    norm: str | None
    shared_statistics: bool
    gates: list[Gate]
    summed: list[float]
    state: list[float]
    gradient: list[float]
    error: float | None

    def __repr__(self) -> str:
        gates = ", ".join(f"{gate.name} {100 * gate.saturated:.3g}%" for gate in self.gates)
        there = ", ".join(f".{name}" for name in ("gates", "summed", "state", "gradient") if getattr(self, name))
        return f"<Recurrence {self.place!r}: {self.cell}, norm {self.norm!r}, saturated {gates}; has {there}>"


@dataclass(frozen=True)
class Shift:
    """Internal covariate shift at each watched step, two ways.

    Attributes:
        inputs: how far the step moves the distribution of the layer's input on one batch (Ioffe & Szegedy 2015):
            Wasserstein distance over standard deviation, the mean over the features. Empty where the input has no
            feature axis.
        gradient: |G' - G| / |G|: G is the gradient with respect to the layer's weights, G' the same after all earlier
            layers have taken their step (Santurkar et al. 2018, definition 2.1). Empty for a layer without weights,
            for the first one, and for those left out where there are very many.
        cosine: the cosine between G and G', likewise.
    """

    inputs: list[float]
    gradient: list[float]
    cosine: list[float]


@dataclass(frozen=True, repr=False)
class Layer:
    """A module that computes something itself: one without children, or with parameters of its own.

    Its repr is a line; the parts have all numbers, and `dataclasses.asdict(layer)` has them at once.

    Attributes:
        name: dotted, as in `model.named_modules()`.
        kind: its class.
        ours: it is one of this library's.
        role: what it does; "other" where it is unknown.
        may_be_norm: a norm, to judge by its name and its shapes, of a class that normwise does not know.
        order: place in the order of first calls, from 0; None if it was never called.
        calls: the most calls in one pass.
        parameters: how many numbers; each counts once, where it is first met.
        trainable: how many of them have `requires_grad`.
        gap: root mean square change of the model's output, in its deviations, when this layer alone is put from eval
            into train mode; None for layers to which the mode makes no difference.
    """

    name: str
    kind: str
    ours: bool
    role: Role
    may_be_norm: bool
    order: int | None
    calls: int
    parameters: int
    trainable: int
    has_bias: bool
    input: Activations | None = None
    output: Activations | None = None
    units: Units | None = None
    gradient: Gradient | None = None
    norm: Norm | None = None
    recurrence: list[Recurrence] = field(default_factory=list)
    shift: Shift | None = None
    gap: float | None = None

    def __repr__(self) -> str:
        from normwise.diagnosis.table import described  # which is made of these records

        there = [
            name
            for name in ("input", "output", "units", "gradient", "norm", "recurrence", "shift", "gap")
            if getattr(self, name) not in (None, [])
        ]
        return f"<Layer {described(self)}{'; has ' if there else ''}{', '.join(f'.{name}' for name in there)}>"
