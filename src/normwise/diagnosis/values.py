"""Numbers about tensors: distributions, units, gradients."""

from __future__ import annotations

from dataclasses import dataclass

from normwise.words import counted

# The percentiles that every distribution has, in this order.
PERCENTILES = (1, 5, 15, 50, 85, 95, 99)


@dataclass(frozen=True, repr=False)
class Histogram:
    """Counts of `len(counts)` bins of equal width from `low` to `high`; the first and last also hold what is beyond."""

    low: float
    high: float
    counts: list[int]

    def __repr__(self) -> str:
        ends = f"from {_number(self.low)} to {_number(self.high)}"
        return f"<Histogram of {sum(self.counts):,}: {counted(len(self.counts), 'bin')} {ends}>"


@dataclass(frozen=True, repr=False)
class Distribution:
    """A set of numbers, whose repr is a line.

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

    def __repr__(self) -> str:
        numbers = ", ".join(
            f"{word} {_number(value)}"
            for word, value in (("mean", self.mean), ("std", self.std), ("from", self.minimum), ("to", self.maximum))
        )
        spoilt = f", {self.nonfinite:,} not finite" if self.nonfinite else ""
        return f"<Distribution of {self.count:,}: {numbers}{spoilt}>"


@dataclass(frozen=True)
class Spread:
    """Mean and deviation taken of each part (feature or sample) on its own, as distributions over the parts."""

    means: Distribution
    stds: Distribution


@dataclass(frozen=True, repr=False)
class OverTime:
    """One number for each time step, over samples and features. `percentiles` has a row for each of `PERCENTILES`."""

    mean: list[float]
    std: list[float]
    percentiles: list[list[float]]

    def __repr__(self) -> str:
        ends = ", ".join(_ends(name, getattr(self, name)) for name in ("mean", "std"))
        return f"<OverTime of {counted(len(self.mean), 'step')}, first to last: {ends}; has .mean, .std, .percentiles>"


@dataclass(frozen=True, repr=False)
class Activations:
    """A layer's input or output over all batches and calls, in train mode; padding counts as it stands there,
    but for that which a norm is told of by `mask=` or `lengths=`.

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

    def __repr__(self) -> str:
        there = [name for name in ("all", "features", "samples", "time") if getattr(self, name) is not None]
        shape = "x".join(map(str, self.shape))
        numbers = f"mean {_number(self.all.mean)}, std {_number(self.all.std)}"
        return f"<Activations {shape}, {self.dtype}: {numbers}; has {', '.join(f'.{name}' for name in there)}>"


def _number(value: float) -> str:
    from normwise.diagnosis.table import number  # which is made of these records

    return number(value)


def _ends(name: str, over_time: list[float]) -> str:
    """The first and the last of numbers over time steps."""
    return f"{name} {_number(over_time[0])} to {_number(over_time[-1])}" if over_time else f"no {name}"


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
