"""From a model and a few batches to numbers: see `records` for what they are."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from normwise.diagnosis import records
from normwise.diagnosis.batches import Batch, Loss, check_functions, main_tensor, take
from normwise.diagnosis.layers import Named, is_ours, may_be_norm, own_parameters, unwrapped
from normwise.diagnosis.modes import Eval, count_nonfinite, matters, passes
from normwise.diagnosis.pace import Pace
from normwise.diagnosis.rules.rule import some
from normwise.diagnosis.steps import check_optimizer, groups, watch_steps
from normwise.diagnosis.watch import Seen, Watch
from normwise.measure.gradients import root_mean
from normwise.measure.preserve import preserved
from normwise.measure.saturation import THRESHOLDS
from normwise.measure.snapshot import state_kept
from normwise.surgery.batches import Forward


def collect(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss | None,
    optimizer: torch.optim.Optimizer | None,
    max_batches: int,
    forward: Forward | None,
    pace: Pace,
) -> records.Diagnosis:
    """All numbers, no findings yet. See `normwise.diagnose` for arguments and errors."""
    check_functions(loss, forward)
    whole = model
    model, wrapper = unwrapped(model)
    if optimizer is not None:
        check_optimizer(model, optimizer)
    notes: list[str] = []
    modes = {name: module.training for name, module in model.named_modules()}
    with preserved(whole, optimizer, batches):
        taken = take(batches, max_batches, model, forward, pace)
        model.train()
        train: list[tuple[Tensor | None, float]] = []
        with state_kept(model), Watch(model, modes) as watch:
            paddings = []
            for batch in taken:
                if pace.over and train:
                    break
                output, value, gradients = watch.train_pass(batch, loss)
                main = main_tensor(output)
                train.append((None if main is None else main.detach(), value))
                watch.count_nonfinite(batch, output, value, gradients)
                paddings.append(watch.valid)
                pace.step()
                del output, gradients
            for seen in watch.layers.values():
                if seen.norm is not None:
                    seen.norm.finish()
        taken = taken[: len(train)]
        if pace.over and len(taken) < max_batches:
            pace.left_out.append(f"batches after the first {len(taken)}")
        called = sorted(watch.layers.values(), key=lambda seen: math.inf if seen.order is None else seen.order)
        used = [Named(seen.name, seen.module, seen.role) for seen in called if seen.order is not None]
        switched = [named for named in used if matters(named)]
        pace.total = passes(switched, len(taken))
        evaluated = Eval(model, taken, pace, notes)
        evaluated.run(loss)
        found_gap, by_layer = evaluated.gap(train, switched)
        spoilt = dataclasses.replace(watch.nonfinite, eval_outputs=evaluated.nonfinite)
        if spoilt.outputs or spoilt.losses or spoilt.gradients or spoilt.eval_outputs:
            spoilt = dataclasses.replace(spoilt, parameters=_spoilt_parameters(model))
        training = None
        shifts: dict[str, records.Shift] = {}
        members: list[records.Group] = []
        if optimizer is not None:
            members = groups([Named(seen.name, seen.module, seen.role) for seen in called], optimizer)
            training, shifts = watch_steps(model, used, taken, loss, optimizer, pace)
        layers = [record(seen, by_layer, shifts) for seen in called]
    if unseen := [name or "the model" for name in watch.unseen]:
        notes.append(
            f"nothing is said of calls inside torch.func's vmap, grad and the like, where no value can be looked at: "
            f"{some(unseen)}"
        )
    if unknown := [f"{x.name} ({x.kind})" for x in layers if x.may_be_norm]:
        notes.append(
            f"unknown layers that may be norms: {some(unknown)}; what is said of norms is said of the known ones alone"
        )
    if (left_out := pace.note()) is not None:
        notes.append(left_out)
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
            steps=_steps(model, taken),
            padding=sum(v.padding * v.mask.numel() for v in valid) / positions if positions else None,
            told_by=valid[0].told_by if valid else None,
        ),
        layers=layers,
        streams=watch.streams.records(),
        attention=watch.attention.records(),
        nonfinite=spoilt,
        gap=found_gap,
        training=training,
        optimizer=members,
        notes=notes,
    )


def _spoilt_parameters(model: torch.nn.Module) -> dict[str, list[int]]:
    """By name how many of how many numbers of a parameter are NaN or infinite, for those that have any."""
    counts = {name: [count_nonfinite(p), p.numel()] for name, p in model.named_parameters()}
    return {name: count for name, count in counts.items() if count[0]}


def ranks() -> int:
    """How many processes train together."""
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        return 1
    return distributed.get_world_size()


def _steps(model: nn.Module, batches: Sequence[Batch]) -> list[int]:
    """Time steps of each batch: of the first sequence (N, T, C), (T, N, C) or (N, C, T), or of tokens (N, T)."""
    shapes = []
    for batch in batches:
        tensors = batch.tensors(model).values()
        found = [t.shape for t in tensors if t.dim() == 3 or (t.dim() == 2 and not t.is_floating_point())]
        shapes += [(found[0], batch.samples)] if found else []
    if not shapes:
        return []
    if len({shape[2] for shape, _ in shapes if len(shape) == 3}) > 1:
        axis = 2  # the number of features would not change
    else:
        axis = 0 if all(shape[0] != samples == shape[1] for shape, samples in shapes) else 1
    return [shape[axis] for shape, _ in shapes]


def record(seen: Seen, gaps: dict[str, float], shifts: dict[str, records.Shift]) -> records.Layer:
    """What was seen of a layer."""
    parameters = own_parameters(seen.module)
    gradient = _gradient(seen)
    return records.Layer(
        name=seen.name,
        kind=type(seen.module).__name__,
        ours=is_ours(seen.module),
        role=seen.role,
        may_be_norm=may_be_norm(Named(seen.name, seen.module, seen.role), seen.input.shape, seen.output.shape),
        order=seen.order,
        calls=seen.most_calls,
        parameters=sum(p.numel() for _, p in parameters),
        trainable=sum(p.numel() for _, p in parameters if p.requires_grad),
        has_bias=any("bias" in name for name, _ in parameters),
        input=seen.input.activations() if seen.input.shape else None,
        output=seen.output.activations() if seen.output.shape else None,
        units=None if seen.order is None else _units(seen),
        gradient=gradient,
        norm=None
        if seen.norm is None
        else seen.norm.record(gradient.weights.get(seen.norm.gain_name) if gradient else None),
        recurrence=[] if seen.recurrent is None else seen.recurrent.record(),
        shift=shifts.get(seen.name),
        gap=gaps.get(seen.name),
    )


def _units(seen: Seen) -> records.Units | None:
    if seen.nonlinearity is None:
        return None
    dead = seen.saturation.dead
    return records.Units(
        seen.nonlinearity,
        THRESHOLDS[seen.nonlinearity],
        seen.saturation.share,
        len(dead),
        float(dead.double().mean()) if len(dead) else 0.0,
        torch.nonzero(dead).flatten().tolist()[:32],
    )


def _gradient(seen: Seen) -> records.Gradient | None:
    if not seen.output_gradient and not seen.weight_gradients:
        return None
    share = None
    if seen.bias_sum is not None and seen.bias_size is not None and bool((seen.bias_size > 0).any()):
        some = seen.bias_size > 0
        share = float((seen.bias_sum[some] / seen.bias_size[some]).max())
    return records.Gradient(
        root_mean(seen.output_gradient) if seen.output_gradient else None,
        {name: root_mean(squares) for name, squares in seen.weight_gradients.items()},
        {name: float(torch.linalg.vector_norm(p.detach())) for name, p in own_parameters(seen.module)},
        share,
    )
