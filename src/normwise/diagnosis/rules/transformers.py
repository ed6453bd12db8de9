"""Rules about transformers: the stream between blocks, attention's logits, and norms that meet half precision."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from statistics import median

from normwise.diagnosis.records import Diagnosis, Stream
from normwise.diagnosis.rules import cures
from normwise.diagnosis.rules.rule import Match, some
from normwise.diagnosis.rules.statistics import norms

# Integers of eight bits that are scaled to the largest of all values leave those of a median feature 127 / 32 = 4
# steps, two bits of seven. (all-MiniLM-L6-v2, a trained BERT, measured: 27, at a kurtosis of 7.)
OUTLIER = 32.0
# Outliers that sit in a few features, and not in a few positions whose features are all large: 1 where all features are
# of one size, 3 where their sizes are spread as a normal variable's are.
KURTOSIS = 10.0
# Blocks that each add as much as the first is large make a stream grow linearly, by the number of blocks in all; those
# that see a norm of it add no more, whatever its size. Twice that is beyond it.
BEYOND_LINEAR = 2.0
# What the median of the later half of the blocks multiplies by where growth is exponential. Linear growth is below
# from the fifth block on.
FACTOR = 1.25
FEWEST_BLOCKS = 5
# Share of the rows that give everything to one key, and how large logits are then: 100 is where QK-Clip cuts (Kimi Team
# 2025, section 2.1). Sharp attention in good health needs log(400 keys) to collapse a row, 13 for a thousand keys.
# (all-MiniLM-L6-v2, measured: 5 % of the rows of its first layer, logits of 64.)
COLLAPSED, LARGE = 0.5, 100.0
# Logits of this distance are rounded to steps of 4 where queries and keys are bfloat16: which key wins is chance.
HUGE = 1000.0
# The largest number that float16 can square.
LARGEST_SQUARED = math.sqrt(65504.0)


def outlier_features(diagnosis: Diagnosis) -> Iterator[Match]:
    for stream in diagnosis.streams:
        where = [
            (name, point)
            for name, point in zip(stream.blocks, stream.points[1:], strict=True)
            if point.median > 0 and point.peak > OUTLIER * point.median and point.kurtosis > KURTOSIS
        ]
        if where:
            name, worst = max(where, key=lambda pair: pair[1].peak / pair[1].median)
            yield Match(
                where[0][0],
                {
                    "blocks": len(where),
                    "of": len(stream.blocks),
                    "worst": name,
                    "peak": worst.peak,
                    "ratio": worst.peak / worst.median,
                    "kurtosis": worst.kurtosis,
                    "channels": worst.outliers,
                },
            )


def growing_stream(diagnosis: Diagnosis) -> Iterator[Match]:
    for stream in diagnosis.streams:
        sizes = [point.size for point in stream.points[1:]]
        if len(sizes) < FEWEST_BLOCKS or not all(size > 0 and math.isfinite(size) for size in sizes):
            continue
        factors = [later / earlier for earlier, later in itertools.pairwise(sizes)]
        factor, growth = median(factors[len(factors) // 2 :]), sizes[-1] / sizes[0]
        if growth > BEYOND_LINEAR * len(sizes) and factor > FACTOR:
            evidence = {"first": sizes[0], "last": sizes[-1], "growth": growth, "factor": factor, "blocks": len(sizes)}
            yield Match(stream.layer, evidence | {"norms": _norms_in(diagnosis, stream)})


def large_logits(diagnosis: Diagnosis) -> Iterator[Match]:
    layers = {layer.name: layer for layer in diagnosis.layers}
    for attention in diagnosis.attention:
        collapsed = attention.collapsed > COLLAPSED and attention.spread > LARGE
        if collapsed or attention.spread > HUGE:
            layer = layers.get(attention.layer)
            line = None if layer is None else cures.smaller_queries_and_keys(layer, attention.spread)
            yield Match(
                attention.layer,
                {
                    "largest": attention.largest,
                    "spread": attention.spread,
                    "collapsed": attention.collapsed,
                    "rows": attention.rows,
                    "line": "" if line is None else f". The weights as they are can be scaled down: {line}",
                },
            )


def squares_beyond_half(diagnosis: Diagnosis) -> Iterator[Match]:
    for layer, norm in norms(diagnosis):
        if norm.largest is not None and norm.largest > LARGEST_SQUARED:
            what = "|x|" if norm.kind == "rms" else "|x - mean|"
            yield Match(layer.name, {"what": what, "largest": norm.largest, "square": norm.largest**2})


def _norms_in(diagnosis: Diagnosis, stream: Stream) -> str:
    prefixes = tuple(f"{name}." for name in stream.blocks)
    names = [
        layer.name
        for layer in diagnosis.layers
        if (layer.role == "norm" or layer.may_be_norm) and layer.name.startswith(prefixes)
    ]
    return f"norms stand at {some(names)}" if names else "no norm stands in the blocks"
