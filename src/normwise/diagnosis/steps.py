"""Steps of the user's optimizer, watched: losses, gradients, and internal covariate shift both ways."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from normwise.diagnosis import records
from normwise.diagnosis.batches import Batch, Loss, scalar
from normwise.diagnosis.errors import DiagnosisError, UserCodeError
from normwise.diagnosis.layers import Layouts, Named, norm_of, own_parameters, tensors_in
from normwise.diagnosis.pace import Pace
from normwise.measure import shift
from normwise.measure.axes import by_axis
from normwise.measure.gradients import loss_and_gradients, total_norm
from normwise.nn.construct import offset_of
from normwise.surgery.parameters import tensors_of

# Internal covariate shift takes a forward and backward pass for each layer and step: evenly spread ones, and the first.
SHIFT_LAYERS, SHIFT_STEPS = 8, 4
# Values of a feature that its distribution is compared on.
VALUES = 4096


def watch_steps(
    model: nn.Module,
    layers: Sequence[Named],
    batches: Sequence[Batch],
    loss: Loss | None,
    optimizer: torch.optim.Optimizer,
    pace: Pace,
) -> tuple[records.Training, dict[str, records.Shift]]:
    """One step on each batch, in train mode. `layers` are those that were called, in that order.

    The caller puts weights and optimizer back.
    """
    check_optimizer(model, optimizer)
    model.train()
    losses, norms = [], []
    shifts: dict[str, records.Shift] = {}
    for number, batch in enumerate(batches):
        if pace.over:
            pace.left_out.append(
                f"steps of the optimizer after the first {number}" if number else "the optimizer's steps"
            )
            break
        of_batch = functools.partial(_loss_of, model, batch, loss)
        replay = shift.Replay(model, of_batch)
        value, gradients = loss_and_gradients(of_batch, dict(model.named_parameters()))
        losses.append(value)
        norms.append(total_norm(gradients.values()))
        of_step = _shift_of_step(replay, batch, layers, gradients) if number < SHIFT_STEPS else None
        _step(model, optimizer, replay, gradients)
        if of_step is not None:
            _add(shifts, layers, of_step)
        pace.step()
    return records.Training(losses, norms), shifts


def _loss_of(model: nn.Module, batch: Batch, loss: Loss | None) -> Tensor:
    return scalar(loss, batch.call(model), batch)


def _add(shifts: dict[str, records.Shift], layers: Sequence[Named], of_step: shift.StepShift) -> None:
    """A number to each list of the layers' `records.Shift`."""
    for named in layers:
        shifts.setdefault(named.name, records.Shift([], [], []))
    for name, value in of_step.of_inputs().items():
        shifts[name].inputs.append(value)
    for name, (change, cosine) in of_step.of_gradients().items():
        shifts[name].gradient.append(change)
        shifts[name].cosine.append(cosine)


def check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """
    Raises:
        DiagnosisError: no optimizer of torch, or one of another model.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise DiagnosisError(f"optimizer must be a torch.optim.Optimizer, but got {type(optimizer).__name__}")
    own = {id(p) for p in model.parameters()}
    if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
        raise DiagnosisError(
            "none of the optimizer's parameters is the model's: build it from this very model's parameters, after the "
            "model was moved or converted"
        )


def groups(layers: Sequence[Named], optimizer: torch.optim.Optimizer) -> list[records.Group]:
    """The parameter groups, and what of norms is in them."""
    gains: dict[int, str] = {}
    biases: dict[int, str] = {}
    for named in layers:
        offset = named.role == "norm" and offset_of(norm_of(named.module))
        for kind, name, tensor in tensors_of(named.module) if named.role in ("norm", "recurrent") else ():
            if kind != "statistics" and not (kind == "gains" and offset):
                (gains if kind == "gains" else biases)[id(tensor)] = f"{named.name}.{name}" if named.name else name
    found = []
    for group in optimizer.param_groups:
        members = [id(p) for p in group["params"]]
        names = [(gains | biases)[i] for i in members if i in gains or i in biases]
        found.append(
            records.Group(
                type(optimizer).__name__,
                float(group.get("lr", 0.0)),
                float(group.get("weight_decay", 0.0)),
                len(members),
                sum(i in gains for i in members),
                sum(i in biases for i in members),
                names[:3],
            )
        )
    return found


def _step(
    model: nn.Module, optimizer: torch.optim.Optimizer, replay: shift.Replay, gradients: dict[str, Tensor]
) -> None:
    def again() -> Tensor:
        value, found = replay.gradients(dict(model.named_parameters()))
        _set_gradients(model, optimizer, found)
        return torch.tensor(value, dtype=torch.float64)

    _set_gradients(model, optimizer, gradients)
    try:
        if isinstance(optimizer, torch.optim.LBFGS):
            optimizer.step(again)
        else:
            optimizer.step()
    except (RuntimeError, TypeError, ValueError) as error:
        raise UserCodeError(
            f"the optimizer raised {type(error).__name__}: {error}\nCure: see that optimizer.step() runs on this "
            "model, or diagnose without optimizer="
        ) from error


def _set_gradients(model: nn.Module, optimizer: torch.optim.Optimizer, gradients: dict[str, Tensor]) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None
    for name, parameter in model.named_parameters():
        parameter.grad = gradients.get(name)


def _shift_of_step(
    replay: shift.Replay, batch: Batch, layers: Sequence[Named], gradients: dict[str, Tensor]
) -> shift.StepShift:
    """Of the inputs of all layers, and of the gradients of some."""
    names = {id(p): name for name, p in replay.model.named_parameters()}
    weights = {named.name: found for named in layers if (found := _weights(named, gradients))}
    modules = {named.name: named for named in layers}
    layouts = Layouts(batch.samples)

    def inputs(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        x = next(tensors_in((*args, *kwargs.values())), None)
        if x is None or x.is_nested or not x.numel():
            return None
        feature = layouts.of(modules[name].module, modules[name].role, x).feature
        if feature is None:
            return None
        rows = by_axis(x.detach(), feature)
        return rows[:, :: -(-rows.shape[1] // VALUES)]

    return shift.StepShift(
        replay,
        [[names[id(p)] for _, p in own_parameters(named.module)] for named in layers],
        gradients,
        {name: weights[name] for name in shift.evenly_spread(list(weights), SHIFT_LAYERS)},
        {name: named.module for name, named in modules.items()},
        inputs,
    )


def _weights(named: Named, gradients: dict[str, Tensor]) -> list[str]:
    """Names in the model of a layer's weight matrices that have a gradient."""
    found = [f"{named.name}.{n}" if named.name else n for n, p in own_parameters(named.module) if p.dim() >= 2]
    return [name for name in found if name in gradients]
