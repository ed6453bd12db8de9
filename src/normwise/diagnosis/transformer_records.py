"""Numbers about transformers: attention, the stream between blocks, and where a NaN comes from."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Attention:
    """The calls of torch's attention in one module, in train mode. `normwise.measure.attention` has the definitions.

    Attributes:
        layer: the innermost module that makes them, as in `model.named_modules()`.
        calls: over all batches.
        heads: None where its tensors have no such axis.
        largest: the largest |q . k * scale| among the keys that a query sees.
        spread: the largest distance of such a logit from the mean of its row, which is all that softmax goes by.
        collapsed: share of the rows (one for each query and head) that give one key more than 0.9975.
        rows: how many were looked at; of very long sequences evenly spaced ones.
    """

    layer: str
    calls: int
    heads: int | None
    largest: float
    spread: float
    collapsed: float
    rows: int


@dataclass(frozen=True)
class StreamPoint:
    """A stream in one place. `normwise.measure.outliers` has the definitions.

    Attributes:
        size: root mean square of the median position.
        kurtosis: of the features' mean squares: 1 where all are of one size, the number of features where one has all.
        peak: the largest |x|.
        median: root mean square of the median feature.
        outliers: indices of the features of more than five times the median one's root mean square, the largest first,
            eight at most.
    """

    size: float
    kurtosis: float
    peak: float
    median: float
    outliers: list[int]


@dataclass(frozen=True)
class Stream:
    """What a chain of blocks hands on from one to the next, over (batch, tokens, features): the residual stream of a
    transformer.

    Attributes:
        layer: the ModuleList or Sequential that holds the blocks.
        blocks: their names.
        features: how many there are.
        points: before the first block, and behind each.
    """

    layer: str
    blocks: list[str]
    features: int
    points: list[StreamPoint]


@dataclass(frozen=True)
class Size:
    """How large something was: the largest |x| of a layer's output, or the norm of the gradient that arrives there."""

    layer: str
    size: float


@dataclass(frozen=True)
class FirstNonFinite:
    """The layer at whose output (on the way back: at whose output's gradient) the first NaN or infinity is.

    Attributes:
        layer: its name.
        comes_in: its input has it already, so that it arises between this layer and the one before.
        before: the last three layers that came before it in this pass, in order, and how large they were.
    """

    layer: str
    comes_in: bool
    before: list[Size] = field(default_factory=list)
