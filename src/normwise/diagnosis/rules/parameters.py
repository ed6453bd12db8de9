"""Rules about gains, biases, frozen layers and the optimizer."""

from __future__ import annotations

from collections.abc import Iterator

from normwise.diagnosis.records import Diagnosis
from normwise.diagnosis.rules import cures
from normwise.diagnosis.rules.rule import Match
from normwise.diagnosis.rules.statistics import norms

# What is left of a bias's gradient where the norm behind takes the bias away: rounding, in units of the sum of
# absolute values. Half precision has three digits.
REMOVED = {"float64": 1e-6, "float32": 1e-3, "float16": 5e-2, "bfloat16": 5e-2}


def removed_bias(diagnosis: Diagnosis) -> Iterator[Match]:
    layers = {layer.name: layer for layer in diagnosis.layers}
    for layer, norm in norms(diagnosis):
        source = layers.get(norm.removes_bias_of or "")
        if source is None or norm.kind not in ("batch", "renorm", "instance") or not norm.batch_statistics:
            continue
        share = source.gradient.bias_share if source.gradient is not None else None
        dtype = source.output.dtype if source.output is not None else "float32"
        if share is not None and share < REMOVED.get(dtype, 1e-3):
            yield Match(source.name, {"norm": layer.name, "share": share, "line": cures.without_bias(source, layer)})


def dead_gains(diagnosis: Diagnosis) -> Iterator[Match]:
    for layer, norm in norms(diagnosis):
        if norm.dead_gains and norm.gain is not None:
            evidence = {"dead": len(norm.dead_gains), "of": norm.gain.count, "channels": norm.dead_gains[:32]}
            evidence |= {"weight": 1.0 - norm.offset}
            yield Match(layer.name, evidence)


def woken(diagnosis: Diagnosis) -> Iterator[Match]:
    if not diagnosis.trainable:
        return
    for layer, norm in norms(diagnosis):
        if norm.running is None or not norm.running.moves:
            continue
        if diagnosis.was_training and not norm.was_training:
            yield Match(layer.name, {"how": "it was given in eval mode inside a model in train mode"})
        elif norm.trainable is False:
            yield Match(layer.name, {"how": "its gain and bias have requires_grad=False"})


def decayed(diagnosis: Diagnosis) -> Iterator[Match]:
    for number, group in enumerate(diagnosis.optimizer):
        if group.weight_decay and group.gains + group.biases:
            evidence = {"optimizer": group.optimizer, "group": number, "weight_decay": group.weight_decay}
            evidence |= {"gains": group.gains, "biases": group.biases, "examples": ", ".join(group.examples)}
            yield Match("", evidence)
