"""From a model and a few batches to numbers: see `records` for what they are."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from normwise.diagnosis import records
from normwise.diagnosis.batches import Batch, Loss, take
from normwise.diagnosis.layers import is_ours, unwrapped
from normwise.diagnosis.modes import gap
from normwise.diagnosis.preserve import buffers_kept, preserved
from normwise.diagnosis.watch import Seen, Watch, own_parameters


def collect(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss,
    optimizer: torch.optim.Optimizer | None,
    max_batches: int,
) -> records.Diagnosis:
    """All numbers, no findings yet. See `normwise.diagnose` for arguments and errors."""
    whole = model
    model, wrapper = unwrapped(model)
    notes: list[str] = []
    modes = {name: module.training for name, module in model.named_modules()}
    with preserved(whole, optimizer, batches):
        taken = take(batches, max_batches, model)
        model.train()
        with buffers_kept(model), Watch(model, modes) as watch:
            train = []
            paddings = []
            for batch in taken:
                output, value, _ = watch.train_pass(batch, loss)
                train.append((output, value))
                paddings.append(watch.valid)
            for seen in watch.layers.values():
                if seen.norm is not None:
                    seen.norm.finish()
        found_gap, by_layer = gap(model, taken, train, loss, notes)
        layers = [_layer(seen, by_layer) for seen in watch.layers.values()]
    layers.sort(key=lambda layer: math.inf if layer.order is None else layer.order)
    valid = [v for v in paddings if v is not None]
    positions = sum(v.mask.numel() for v in valid)
    return records.Diagnosis(
        model=type(model).__name__,
        wrapper=wrapper,
        ranks=ranks(),
        was_training=modes[""],
        parameters=sum(p.numel() for p in model.parameters()),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        data=records.Data(
            batches=len(taken),
            sizes=[batch.samples for batch in taken],
            steps=_steps(taken),
            padding=sum(v.padding * v.mask.numel() for v in valid) / positions if positions else None,
            told_by=valid[0].told_by if valid else None,
        ),
        layers=layers,
        gap=found_gap,
        notes=notes,
    )


def ranks() -> int:
    """How many processes train together."""
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        return 1
    return distributed.get_world_size()


def _steps(batches: Sequence[Batch]) -> list[int]:
    """Time steps of each batch: of the first sequence (N, T, C) or tokens (N, T) among its inputs."""
    found = []
    for batch in batches:
        shapes = [
            t.shape for t in batch.tensors().values() if t.dim() == 3 or (t.dim() == 2 and not t.is_floating_point())
        ]
        found += [shapes[0][1]] if shapes else []
    return found


def _layer(seen: Seen, gaps: dict[str, float]) -> records.Layer:
    parameters = own_parameters(seen.module)
    gradient = _gradient(seen)
    return records.Layer(
        name=seen.name,
        kind=type(seen.module).__name__,
        ours=is_ours(seen.module),
        role=seen.role,
        order=seen.order,
        calls=seen.most_calls,
        parameters=sum(p.numel() for _, p in parameters),
        trainable=sum(p.numel() for _, p in parameters if p.requires_grad),
        has_bias=any("bias" in name for name, _ in parameters),
        input=seen.input.activations() if seen.input.shape else None,
        output=seen.output.activations() if seen.output.shape else None,
        units=seen.units.record() if seen.units is not None and seen.order is not None else None,
        gradient=gradient,
        norm=None if seen.norm is None else seen.norm.record(gradient.weights.get("weight") if gradient else None),
        recurrence=[] if seen.recurrent is None else seen.recurrent.record(),
        gap=gaps.get(seen.name),
    )


def _gradient(seen: Seen) -> records.Gradient | None:
    if not seen.output_gradient and not seen.weight_gradients:
        return None
    share = None
    if seen.bias_sum is not None and seen.bias_size is not None and bool((seen.bias_size > 0).any()):
        some = seen.bias_size > 0
        share = float((seen.bias_sum[some] / seen.bias_size[some]).max())
    return records.Gradient(
        _root_mean(seen.output_gradient) if seen.output_gradient else None,
        {name: _root_mean(squares) for name, squares in seen.weight_gradients.items()},
        {name: float(p.detach().double().norm()) for name, p in own_parameters(seen.module)},
        share,
    )


def _root_mean(squares: Sequence[float]) -> float:
    return math.sqrt(sum(squares) / len(squares))
