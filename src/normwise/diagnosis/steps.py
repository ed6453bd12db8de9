"""Steps of the user's optimizer, watched: losses, gradients, and internal covariate shift both ways."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from normwise.diagnosis import records
from normwise.diagnosis.batches import Batch, Loss, scalar
from normwise.diagnosis.distributions import by_axis
from normwise.diagnosis.errors import DiagnosisError, UserCodeError
from normwise.diagnosis.layers import Layouts, Named, own_parameters, tensors_in
from normwise.diagnosis.pace import Pace
from normwise.diagnosis.preserve import buffers_kept
from normwise.reference import shift

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
        run = _Run(model, batch, loss)
        value, gradients = run.gradients(dict(model.named_parameters()))
        losses.append(value)
        norms.append(float(torch.stack([g.double().square().sum().cpu() for g in gradients.values()]).sum().sqrt()))
        of_step = _ShiftOfStep(run, layers, gradients) if number < SHIFT_STEPS else None
        _step(model, optimizer, run, gradients)
        if of_step is not None:
            of_step.after_step(shifts)
        pace.step()
    return records.Training(losses, norms), shifts


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
        if named.role == "norm":
            for name, parameter in named.module.named_parameters(recurse=False):
                (biases if "bias" in name else gains)[id(parameter)] = f"{named.name}.{name}" if named.name else name
        elif named.role == "recurrent":
            for name, parameter in named.module.named_parameters(recurse=False):
                if name.startswith("gain_"):
                    gains[id(parameter)] = f"{named.name}.{name}" if named.name else name
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


class _Run:
    """One batch, called again and again with the same random numbers and the same buffers."""

    def __init__(self, model: nn.Module, batch: Batch, loss: Loss | None) -> None:
        self.model, self.batch, self.loss = model, batch, loss
        self.state = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None

    def value(self) -> Tensor:
        torch.set_rng_state(self.state)
        if self.cuda is not None:
            torch.cuda.set_rng_state_all(self.cuda)
        return scalar(self.loss, self.batch.call(self.model), self.batch)

    def gradients(self, wanted: dict[str, nn.Parameter]) -> tuple[float, dict[str, Tensor]]:
        """The loss, and its gradient with respect to those that have one."""
        wanted = {name: p for name, p in wanted.items() if p.requires_grad}
        with torch.enable_grad():
            value = self.value()
            found = torch.autograd.grad(value, list(wanted.values()), allow_unused=True)
        return float(value.detach()), {n: g.detach() for n, g in zip(wanted, found, strict=True) if g is not None}


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, run: _Run, gradients: dict[str, Tensor]) -> None:
    def again() -> Tensor:
        _set_gradients(model, optimizer, run.gradients(dict(model.named_parameters()))[1])
        return run.value().detach()

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


class _ShiftOfStep:
    """Made before the step; `after_step` measures what it did to the layers' inputs and gradients."""

    def __init__(self, run: _Run, layers: Sequence[Named], gradients: dict[str, Tensor]) -> None:
        self.run, self.layers, self.gradients = run, layers, gradients
        self.before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
        self.chosen = shift.spread([named for named in layers if self._weights(named)], SHIFT_LAYERS)
        self.inputs = self._inputs()

    def after_step(self, shifts: dict[str, records.Shift]) -> None:
        """Adds a number to each list of the layers' `records.Shift`."""
        for named in self.layers:
            shifts.setdefault(named.name, records.Shift([], [], []))
        for name, now in self._inputs().items():
            if name in self.inputs and self.inputs[name].shape == now.shape:
                shifts[name].inputs.append(shift.moved(self.inputs[name], now))
        for name, gradient, cosine in self._moved():
            shifts[name].gradient.append(gradient)
            shifts[name].cosine.append(cosine)

    def _weights(self, named: Named) -> list[str]:
        """Names in the model of a layer's weight matrices that have a gradient."""
        found = [f"{named.name}.{n}" if named.name else n for n, p in own_parameters(named.module) if p.dim() >= 2]
        return [name for name in found if name in self.gradients]

    def _inputs(self) -> dict[str, Tensor]:
        """What each layer gets first, (features, values)."""
        seen: dict[str, Tensor] = {}
        layouts = Layouts(self.run.batch.samples)
        hooks = [n.module.register_forward_pre_hook(_keeper(seen, n, layouts), with_kwargs=True) for n in self.layers]
        try:
            with buffers_kept(self.run.model):
                self.run.value()
        finally:
            for hook in hooks:
                hook.remove()
        return seen

    def _moved(self) -> Iterator[tuple[str, float, float]]:
        """(layer, both parts of `shift.changed`): from the last layer to the first, ever more is as before the step."""
        parameters = dict(self.run.model.named_parameters())
        with _values_kept(list(parameters.values())):
            places = [named.name for named in self.layers]
            called = {id(p) for named in self.layers for _, p in own_parameters(named.module)}
            self._set_back([name for name, p in parameters.items() if id(p) not in called], parameters)
            back_from = len(places)
            for named in reversed(self.chosen):
                place = places.index(named.name)
                for later in self.layers[place:back_from]:
                    self._set_back([name for name, p in parameters.items() if _owns(later, p)], parameters)
                back_from = place
                wanted = {name: parameters[name] for name in self._weights(named)}
                with buffers_kept(self.run.model):
                    _, moved = self.run.gradients(wanted)
                old = torch.cat([self.gradients[name].flatten() for name in moved]).double()
                new = torch.cat([gradient.flatten() for gradient in moved.values()]).double()
                change = shift.changed(old, new)
                if change is not None:
                    yield named.name, *change

    @torch.no_grad()
    def _set_back(self, names: Sequence[str], parameters: dict[str, nn.Parameter]) -> None:
        for name in names:
            parameters[name].copy_(self.before[name])


def _owns(named: Named, parameter: nn.Parameter) -> bool:
    return any(p is parameter for _, p in own_parameters(named.module))


def _keeper(seen: dict[str, Tensor], named: Named, layouts: Layouts) -> Callable[..., None]:
    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = next(tensors_in((*args, *kwargs.values())), None)
        if x is None or named.name in seen or x.is_nested or not x.numel():
            return
        feature = layouts.of(module, named.role, x).feature
        if feature is not None:
            rows = by_axis(x.detach(), feature)
            seen[named.name] = rows[:, :: -(-rows.shape[1] // VALUES)].clone()

    return keep


@contextmanager
def _values_kept(parameters: Sequence[Tensor]) -> Iterator[None]:
    kept = [p.detach().clone() for p in parameters]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.copy_(value)
