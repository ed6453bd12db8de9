"""Train mode against eval mode: how far the outputs are apart, and which layer's mode it is that moves them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from normwise.diagnosis import records
from normwise.diagnosis.batches import Batch, Loss, first_tensor, scalar
from normwise.diagnosis.errors import DiagnosisError
from normwise.diagnosis.layers import Named, layers_of, norm_kind
from normwise.diagnosis.preserve import buffers_kept

# Layers whose mode is switched one at a time are seen on this many batches: a pass each.
BATCHES = 2
# To these the mode makes no difference.
INDIFFERENT = ("linear", "conv", "embedding", "nonlinearity")


@torch.no_grad()
def gap(
    model: nn.Module, batches: Sequence[Batch], train: Sequence[tuple[Any, float]], loss: Loss, notes: list[str]
) -> tuple[records.Gap | None, dict[str, float]]:
    """The model's gap, and that of each layer on its own. `train` has the output and loss of each batch in train mode.

    The model is left in eval mode.
    """
    model.eval()
    outputs, losses = [], []
    for batch in batches:
        output = batch.call(model)
        outputs.append(first_tensor(output))
        try:
            losses.append(float(scalar(loss, output, batch.target)))
        except DiagnosisError as error:
            if not notes:
                notes.append(f"no loss in eval mode: {error}".partition("\n")[0])
    pairs = [(y, first_tensor(t)) for y, (t, _) in zip(outputs, train, strict=True)]
    whole = _apart([(y, t) for y, t in pairs if y is not None and t is not None])
    if whole is None:
        notes.append("no gap between the modes: the outputs hold no floating tensors, or these differ in shape")
        return None, {}
    switched = [named for named in layers_of(model) if matters(named)]
    by_layer = {named.name: _switched(model, [named.module], batches, outputs) for named in switched}
    rest = [m for m in model.modules() if m not in {named.module for named in layers_of(model)}]
    found = records.Gap(
        whole,
        sum(value for _, value in train) / len(train),
        sum(losses) / len(losses) if len(losses) == len(batches) else None,
        _switched(model, rest, batches, outputs) if rest else None,
    )
    return found, {name: value for name, value in by_layer.items() if value is not None}


def matters(named: Named) -> bool:
    """Whether the mode can make a difference to a layer; of a class that nobody knows it may."""
    if named.role == "norm":
        return norm_kind(named.module) in ("batch", "renorm", "instance")
    if named.role == "dropout":
        return bool(getattr(named.module, "p", 1.0))
    return named.role not in INDIFFERENT


def _switched(
    model: nn.Module, modules: Sequence[nn.Module], batches: Sequence[Batch], outputs: Sequence[Tensor | None]
) -> float | None:
    """The gap with these modules alone in train mode, not their children; None where they cannot be."""
    pairs = []
    kept = [m.training for m in modules]
    try:
        for module in modules:
            module.training = True
        for batch, reference in zip(batches[:BATCHES], outputs, strict=False):
            with buffers_kept(*modules):
                output = first_tensor(batch.call(model))
            if reference is not None and output is not None:
                pairs.append((reference, output))
    except DiagnosisError:
        return None  # such as a container that asks for targets in train mode
    finally:
        for module, training in zip(modules, kept, strict=True):
            module.training = training
    return _apart(pairs)


def _apart(pairs: Sequence[tuple[Tensor, Tensor]]) -> float | None:
    """Root mean square difference, in deviations of the first of each pair."""
    if not pairs or any(a.shape != b.shape for a, b in pairs):
        return None
    first = torch.cat([a.double().flatten() for a, _ in pairs])
    second = torch.cat([b.double().flatten() for _, b in pairs])
    spread = float(first.std(correction=0))
    difference = float((first - second).square().mean().sqrt())
    if not difference:
        return 0.0
    return difference / spread if spread else math.inf
