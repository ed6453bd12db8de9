"""Rules about statistics: where they come from, and whether they are any good."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from normwise.diagnosis.records import Diagnosis, Layer, Norm
from normwise.diagnosis.rules import cures
from normwise.diagnosis.rules.rule import Match
from normwise.words import counted

# A mean of m values strays by 1/sqrt(m) deviations: a quarter of one at 16. Positions of one image are much alike, so
# samples count as well: below 4 of them Wu & He (2018) see the error rise steeply.
FEWEST_VALUES, FEWEST_SAMPLES = 16, 4
# Below this many channels a norm of one row says next to nothing, and `normwise.convert` refuses it.
FEWEST_IN_A_GROUP = 4
# How far running statistics may be from the data's, medians over the channels, before noise is allowed for: half a
# deviation, or a factor of two in the variance.
DISTANCE, LOG_RATIO = 0.5, 1.0
# A share of a deviation by which padding moves the mean, below which nobody would notice.
PADDING_SHIFT = 0.01
# In torch the new batch's weight: 0.1 is usual. Keras and Flax say 0.9 or 0.99 for the same.
SWAPPED_MOMENTUM = 0.9
# Local samples below which the ranks' statistics differ enough to matter.
LOCAL_SAMPLES = 16
# Rounding noise in an output whose deviation is 1.
NOISE = 0.1
# Lengths of batches that differ by more than this factor.
VARYING = 1.25


def norms(diagnosis: Diagnosis) -> Iterator[tuple[Layer, Norm]]:
    """The norm layers that were called."""
    for layer in diagnosis.layers:
        if layer.norm is not None and layer.calls:
            yield layer, layer.norm


def few_values(diagnosis: Diagnosis) -> Iterator[Match]:
    for layer, norm in norms(diagnosis):
        if not norm.batch_statistics or norm.values is None or norm.samples is None:
            continue
        ranks = diagnosis.ranks if norm.synchronized else 1
        values, samples = norm.values * ranks, norm.samples * ranks
        if norm.kind == "batch" and (values < FEWEST_VALUES or samples < FEWEST_SAMPLES):
            yield Match(layer.name, _few(values, samples, _instead(layer)))
        elif norm.kind == "instance" and values < FEWEST_SAMPLES:
            yield Match(layer.name, _few(values, 1, _instead(layer)))
    smallest = min(diagnosis.data.sizes)
    for layer in diagnosis.layers:
        if any(inside.norm == "batch" for inside in layer.recurrence) and 0 < smallest < FEWEST_VALUES:
            inside = "norm='layer' inside the recurrence, where the layer is built"
            yield Match(layer.name, _few(smallest, smallest, inside))


def _few(values: int, samples: int, instead: str) -> dict[str, Any]:
    return {"values": values, "samples": samples, "standard_error": 1 / math.sqrt(values), "instead": instead}


def _instead(layer: Layer) -> str:
    """A norm that needs no batch, unless `normwise.convert` would refuse it for what it would have to go by."""
    if layer.norm is not None and layer.norm.segments:
        return "LayerNorm with segments=, whose statistics are those of all features of a segment"
    shape = layer.input.shape if layer.input is not None else []
    renorm = "model, _ = normwise.convert(model, to='renorm'), which normalizes by running statistics as well"
    if 1 < len(shape) < 4 and shape[1] < FEWEST_IN_A_GROUP:
        return renorm
    return f"model, _ = normwise.convert(model, to='group'), whose statistics are per sample; or {renorm}"


def far_running(diagnosis: Diagnosis) -> Iterator[Match]:
    running = [(layer, norm.running) for layer, norm in norms(diagnosis) if norm.running is not None]
    fresh = all(r.initial and not r.tracked for _, r in running)
    for layer, r in running:
        if fresh or r.nonfinite or not r.distance.count:
            continue
        distance, log_ratio = r.distance.percentile(50), r.log_ratio.percentile(50)
        # The variance of a sample strays by sqrt(2/n) of itself.
        if distance > DISTANCE + 3 * r.noise or abs(log_ratio) > LOG_RATIO + 3 * math.sqrt(2) / math.log(2) * r.noise:
            seen = "an unknown number of batches" if r.tracked is None else counted(r.tracked, "batch")
            yield Match(layer.name, {"distance": distance, "ratio": 2**log_ratio, "tracked": seen})


def nonfinite(diagnosis: Diagnosis) -> Iterator[Match]:
    for layer, norm in norms(diagnosis):
        channels = norm.running.nonfinite if norm.running is not None else 0
        values = layer.input.all.nonfinite if layer.input is not None else 0
        if channels or (values and norm.batch_statistics):
            what = f"{channels} of the running means and variances are NaN, infinite or negative" if channels else ""
            what += " and " if channels and values else ""
            what += (
                f"{counted(values, 'value')} of its input {'is' if values == 1 else 'are'} not finite" if values else ""
            )
            yield Match(layer.name, {"what": what, "channels": channels, "values": values})


def padding_enters(diagnosis: Diagnosis) -> Iterator[Match]:
    for layer, norm in norms(diagnosis):
        if norm.padding and norm.padding_shift is not None and norm.padding_shift > PADDING_SHIFT:
            told_by = diagnosis.data.told_by or "the inputs"
            yield Match(layer.name, {"padding": norm.padding, "shift": norm.padding_shift, "told_by": told_by})


def swapped_momentum(diagnosis: Diagnosis) -> Iterator[Match]:
    for layer, norm in norms(diagnosis):
        if norm.running is not None and norm.momentum is not None and SWAPPED_MOMENTUM <= norm.momentum < 1:
            swapped = round(1 - norm.momentum, 10)
            yield Match(layer.name, {"momentum": norm.momentum, "swapped": swapped})


def statistics_of_a_rank(diagnosis: Diagnosis) -> Iterator[Match]:
    if diagnosis.ranks < 2:
        return
    for layer, norm in norms(diagnosis):
        small = norm.samples is not None and norm.samples < LOCAL_SAMPLES
        if norm.kind == "batch" and norm.batch_statistics and not norm.synchronized and small:
            yield Match(layer.name, {"samples": norm.samples, "ranks": diagnosis.ranks})


def small_eps(diagnosis: Diagnosis) -> Iterator[Match]:
    for layer, norm in norms(diagnosis):
        dtype = getattr(torch, layer.input.dtype) if layer.input is not None else torch.float32
        vanishes = not float(torch.tensor(norm.eps, dtype=dtype)) and norm.kind != "rms"
        if vanishes or norm.noise > NOISE:
            name = str(dtype).removeprefix("torch.")
            what = f"eps={norm.eps:g} is 0 in {name}, the input's dtype: a constant input is divided by 0"
            if not vanishes:
                what = f"Some variances of the {name} input are rounding error, which eps={norm.eps:g} lets the norm "
                what += f"scale up to {norm.noise:.2g} of its output's deviation"
            needed = 10.0 ** math.ceil(math.log10(max(norm.needed_eps, 1e-5)) - 1e-9)
            evidence = {"eps": norm.eps, "dtype": name, "noise": norm.noise, "needed": needed}
            yield Match(layer.name, evidence | {"what": what})


def in_a_recurrence(diagnosis: Diagnosis) -> Iterator[Match]:
    for layer, norm in norms(diagnosis):
        if norm.kind not in ("batch", "renorm") or not norm.batch_statistics:
            continue
        if norm.inside_recurrence:
            how = f"its output comes back as its input, {layer.calls} times a pass, with one set of running statistics"
            cure = cures.text("inside", cures.norm_in_place(layer))
            yield Match(layer.name, {"how": how, "calls": layer.calls, "cure": cure})
        elif norm.lengths and norm.lengths[1] > VARYING * norm.lengths[0] and not norm.masked and not norm.padding:
            shortest, longest = norm.lengths
            how = f"the batches are {shortest} to {longest} steps long, and it is given neither mask nor lengths"
            evidence = {"how": how, "shortest": shortest, "longest": longest}
            yield Match(layer.name, evidence | {"cure": cures.text("lengths")})
    for layer in diagnosis.layers:
        if any(inside.shared_statistics for inside in layer.recurrence):
            how = "all its time steps share one row of running statistics (num_stat_steps=1)"
            yield Match(layer.name, {"how": how, "calls": layer.calls, "cure": cures.text("shared")})
