"""What a diagnosis consists of: plain numbers, layer by layer, and the findings drawn from them.

    Diagnosis
      .findings, .silenced   list[Finding]      what the rules say of the numbers, the gravest first
      .layers                list[Layer]        in the order of their first call; those never called come last
      .gap                   Gap | None         how far the outputs of train and eval mode are apart, and whose doing
      .training              Training | None    the steps that were watched, if there was an optimizer
      .optimizer             list[Group]        its parameter groups
      .data                  Data               the batches: sizes, lengths, padding
      .notes                 list[str]          what could not be measured, and why

    Layer
      .input, .output        Activations        distributions over all values, features, samples and time steps
      .units                 Units              saturated and dead units of a nonlinearity
      .gradient              Gradient           of the loss, with respect to its output and its weights
      .norm                  Norm               a norm's settings, gains and biases, running against batch statistics
      .recurrence            list[Recurrence]   gates, summed inputs and gradients over time, one for each direction
      .shift                 Shift              internal covariate shift over the steps that were watched
      .gap                   float              how much of the train/eval gap appears when it alone is in train mode

Every record is a frozen dataclass of numbers, strings, lists and other records; what was not measured is None. All of
it survives `Diagnosis.from_dict(diagnosis.to_dict())` and `from_json(to_json())`, which writes NaN and infinity as
strings, since JSON has neither. `VERSION` goes up when a field changes its meaning or goes away.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

VERSION = 1

# The percentiles that every distribution has, in this order.
PERCENTILES = (1, 5, 15, 50, 85, 95, 99)

Severity = Literal["error", "warning", "advice"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "advice")

Role = Literal["norm", "linear", "conv", "recurrent", "attention", "embedding", "nonlinearity", "dropout", "other"]


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or could be better.

    Attributes:
        code: "NW001" and so on: stable, what silencing and scripts go by.
        severity: "error" (results are wrong), "warning" (training or evaluation suffers), "advice".
        layer: the dotted name in `model.named_modules()`; "" where it is about the whole model.
        title: what is found, in a few words: the same for every finding of a code.
        evidence: the numbers, by name.
        cause: one or two sentences that say with these numbers why it is so.
        cure: what to do: a call of this library, or a line of code.
        claims: ids of the published claims that stand behind it, as in `normwise claims`.
    """

    code: str
    severity: Severity
    layer: str
    title: str
    evidence: dict[str, Any]
    cause: str
    cure: str
    claims: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Histogram:
    """Counts of `len(counts)` bins of equal width from `low` to `high`; the first and last also hold what is beyond."""

    low: float
    high: float
    counts: list[int]


@dataclass(frozen=True)
class Distribution:
    """A set of numbers.

    `mean`, `std` (biased), `minimum` and `maximum` are over all `count` finite values. `percentiles` (those of
    `PERCENTILES`) and the histogram are over an evenly spaced part of them where there are very many.
    """

    count: int
    nonfinite: int
    mean: float
    std: float
    minimum: float
    maximum: float
    percentiles: list[float]
    histogram: Histogram

    def percentile(self, wanted: int) -> float:
        """One of `PERCENTILES`."""
        return self.percentiles[PERCENTILES.index(wanted)]


@dataclass(frozen=True)
class Spread:
    """Mean and deviation taken of each part (feature or sample) on its own, as distributions over the parts."""

    means: Distribution
    stds: Distribution


@dataclass(frozen=True)
class OverTime:
    """One number for each time step, over samples and features. `percentiles` has a row for each of `PERCENTILES`."""

    mean: list[float]
    std: list[float]
    percentiles: list[list[float]]


@dataclass(frozen=True)
class Activations:
    """A layer's input or output over all batches and calls, in train mode; padding counts as it stands there.

    Attributes:
        shape, dtype: of the first batch.
        all: every value.
        features: over the features (channels) where the tensor has such an axis.
        samples: over the samples.
        time: over the time steps of a sequence.
    """

    shape: list[int]
    dtype: str
    all: Distribution
    features: Spread | None = None
    samples: Spread | None = None
    time: OverTime | None = None


@dataclass(frozen=True)
class Units:
    """A nonlinearity's units: the features (channels) of its input.

    Attributes:
        nonlinearity: "sigmoid", "tanh" or "relu".
        threshold: an input beyond it (in absolute value) is saturated: 6 for a sigmoid, whose slope is 0.0025 there,
            3 for tanh(x) = 2 sigmoid(2x) - 1; 0 for a ReLU, which passes no gradient below it.
        saturated: share of all inputs that are saturated.
        dead: share of the units whose every input is saturated, over all batches.
        dead_units: their indices, the first 32.
    """

    nonlinearity: str
    threshold: float
    saturated: float
    units: int
    dead: float
    dead_units: list[int]


@dataclass(frozen=True)
class Gradient:
    """Of the loss, the root mean square over the batches of Euclidean norms.

    Attributes:
        output: with respect to the layer's output, one number whatever its size; None where none arrives.
        weights: with respect to each parameter, by name.
        weight_norms: Euclidean norms of these parameters.
        bias_share: |sum| / sum | | over batch and positions of the gradient that the bias receives, largest over the
            features: about 0 where something behind the layer takes the bias away again.
    """

    output: float | None
    weights: dict[str, float]
    weight_norms: dict[str, float]
    bias_share: float | None = None


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
        kind: "batch", "instance", "layer", "group", "rms", or "frozen" for a FrozenBatchNorm.
        synchronized: its batch statistics are over all ranks.
        batch_statistics: in train mode they are taken over the batch.
        was_training: the layer was in train mode when the model was given.
        trainable: its gain or bias has `requires_grad`; None without these.
        values: the fewest values that one statistic came from, over all batches.
        samples: the fewest samples that entered.
        lengths: the shortest and longest L among inputs (N, C, L).
        masked: every call came with a mask or lengths, or with ragged input.
        padding: share of the positions that are padding and enter the statistics nevertheless.
        padding_shift: how far that moves a channel's mean, in its deviations: the median over the channels.
        eps, momentum: its settings.
        noise: what rounding of the input amounts to in the output, whose deviation is 1: the largest over those
            statistics whose variance is itself no more than rounding. 0 where there are none.
        needed_eps: an eps that would keep it below 1 %.
        gain, bias: distributions over the channels.
        gain_gradient: norm of the gain's gradient.
        dead_gains: indices of channels whose gain is next to nothing beside the median's.
        removes_bias_of: the layer whose output comes in as it is and whose bias this norm takes away again.
        inside_recurrence: its output goes into its own input at a later call of the same pass.
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
    momentum: float | None
    noise: float
    needed_eps: float
    gain: Distribution | None
    bias: Distribution | None
    gain_gradient: float | None
    dead_gains: list[int]
    removes_bias_of: str | None
    inside_recurrence: bool
    running: Running | None


@dataclass(frozen=True)
class Gate:
    """One gate of a recurrent layer: the share of its values beyond the threshold, over all and at each time step."""

    name: str
    threshold: float
    saturated: float
    over_time: list[float]


@dataclass(frozen=True)
class Recurrence:
    """One layer in one direction of a recurrent module, recomputed step by step from its weights and inputs.

    Lists over time are in the order of processing: for a backward direction step 0 is each sequence's last. They end
    where fewer than five sequences go on.

    Attributes:
        place: as torch ends the names of its parameters: "l0", "l0_reverse", "l1".
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


@dataclass(frozen=True)
class Layer:
    """A module that computes something itself: one without children, or with parameters of its own.

    Attributes:
        name: dotted, as in `model.named_modules()`.
        kind: its class.
        ours: it is one of this library's.
        role: what it does; "other" where it is unknown.
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


@dataclass(frozen=True)
class Gap:
    """Train mode against eval mode on the same batches.

    Attributes:
        output: root mean square difference of the outputs, in deviations of the eval-mode output.
        train_loss, eval_loss: means over the batches.
        elsewhere: the part that no single layer's mode brings about: code that reads `self.training` outside a layer.
    """

    output: float
    train_loss: float
    eval_loss: float | None
    elsewhere: float | None = None


@dataclass(frozen=True)
class Training:
    """The watched steps: the loss before each, and the norm of the whole gradient."""

    losses: list[float]
    gradients: list[float]


@dataclass(frozen=True)
class Group:
    """A parameter group of the optimizer.

    Attributes:
        weight_decay: its setting.
        gains, biases: how many gains and biases of norm layers are in it, as parameters.
        examples: names of a few of these.
    """

    optimizer: str
    learning_rate: float
    weight_decay: float
    parameters: int
    gains: int
    biases: int
    examples: list[str]


@dataclass(frozen=True)
class Data:
    """The batches.

    Attributes:
        batches: how many were looked at.
        sizes: samples in each.
        steps: time steps in each, for sequences.
        padding: share of the positions that are padding, over all batches; None where nothing tells.
        told_by: what tells which positions are padding: the name of an input, "trailing zeros", "padding_idx".
    """

    batches: int
    sizes: list[int]
    steps: list[int]
    padding: float | None
    told_by: str | None


@dataclass(frozen=True)
class Diagnosis:
    """Everything that `normwise.diagnose` saw. See the module's docstring for the overview.

    Attributes:
        model: class of the model.
        wrapper: class of what it was wrapped in, such as "DistributedDataParallel".
        ranks: how many processes train together.
        was_training: the mode in which it was given.
        parameters, trainable: numbers in all.
    """

    model: str
    wrapper: str | None
    ranks: int
    was_training: bool
    parameters: int
    trainable: int
    data: Data
    layers: list[Layer]
    gap: Gap | None = None
    training: Training | None = None
    optimizer: list[Group] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    silenced: list[Finding] = field(default_factory=list)
    version: int = VERSION

    def layer(self, name: str) -> Layer:
        """The layer of that name.

        Raises:
            KeyError: there is none; names those that there are.
        """
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(f"no layer {name!r}: the layers are {', '.join(repr(layer.name) for layer in self.layers)}")

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, numbers and strings."""
        return dataclasses.asdict(self)

    def to_json(self, indent: int | None = None) -> str:
        """Strict JSON: NaN and infinities are the strings "NaN", "Infinity", "-Infinity"."""
        return json.dumps(_strict(self.to_dict()), indent=indent, allow_nan=False)

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> Diagnosis:
        """The inverse of `to_dict`, and of `to_json` after `json.loads`.

        Raises:
            ValueError: written by another version of this format.
        """
        if plain.get("version") != VERSION:
            raise ValueError(
                f"this diagnosis has format version {plain.get('version')!r}, but this normwise reads {VERSION}: "
                "diagnose the model again"
            )
        return _restored(cls, plain)

    @classmethod
    def from_json(cls, text: str) -> Diagnosis:
        """The inverse of `to_json`; raises as `from_dict`."""
        return cls.from_dict(json.loads(text))


_NAMES = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _strict(value: Any) -> Any:
    """`value` with non-finite numbers as strings."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, dict):
        return {key: _strict(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_strict(v) for v in value]
    return value


T = TypeVar("T")


def _restored(kind: type[T], plain: dict[str, Any]) -> T:
    """A record of class `kind` from what `dataclasses.asdict` made of it."""
    hints = typing.get_type_hints(kind)
    return kind(**{f.name: _value(hints[f.name], plain[f.name]) for f in dataclasses.fields(kind)})  # type: ignore[arg-type]


def _value(hint: Any, value: Any) -> Any:
    if value is None:
        return None
    if isinstance(hint, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is list:
        return [_value(arguments[0], v) for v in value]
    if origin is dict:
        return {key: _value(arguments[1], v) for key, v in value.items()}
    if dataclasses.is_dataclass(hint):
        return _restored(hint, value)  # type: ignore[arg-type]
    return _NAMES[value] if hint in (float, Any) and isinstance(value, str) and value in _NAMES else value
