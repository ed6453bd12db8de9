"""Train mode against eval mode: how far the outputs are apart, and which layer's mode it is that moves them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from normwise.diagnosis import records
from normwise.diagnosis.batches import Batch, Loss, all_tensors, main_tensor, scalar
from normwise.diagnosis.errors import DiagnosisError
from normwise.diagnosis.layers import Named, layers_of, norm_kind, norm_of
from normwise.diagnosis.pace import Pace
from normwise.diagnosis.rules.rule import some
from normwise.measure.snapshot import modes_kept, state_kept
from normwise.surgery.freeze import is_frozen

# Layers whose mode is switched one at a time are seen on this many batches: a pass each.
BATCHES = 2

# Passes keep autograd on: a forward may differentiate (forces of an energy). What is kept of them is detached.


class Eval:
    """The model in eval mode on the batches, and then with single layers in train mode."""

    def __init__(self, model: nn.Module, batches: Sequence[Batch], pace: Pace, notes: list[str]) -> None:
        self.model, self.batches, self.pace, self.notes = model, batches, pace, notes
        self.outputs: list[Tensor | None] = []
        self.losses: list[float] = []
        self.nonfinite = 0

    def run(self, loss: Loss | None) -> None:
        """All batches, for which there is time; the model is left in eval mode."""
        self.model.eval()
        refused: str | None = None
        for batch in self.batches:
            if self.pace.over and self.outputs:
                break
            output = batch.call(self.model)
            main = main_tensor(output)
            self.outputs.append(None if main is None else main.detach())
            self.nonfinite += count_nonfinite(output)
            try:
                self.losses.append(float(scalar(loss, output, batch).detach()))
            except DiagnosisError as error:
                refused = refused or f"no loss in eval mode: {error}".partition("\n")[0]
            self.pace.step()
        if refused is not None:
            self.losses = []
            self.notes.append(refused)

    def gap(
        self, train: Sequence[tuple[Tensor | None, float]], named: Sequence[Named]
    ) -> tuple[records.Gap | None, dict[str, float]]:
        """The model's gap, and that of each of these layers alone. `train` has output and loss of each batch."""
        pairs = [(y, t) for y, (t, _) in zip(self.outputs, train, strict=False) if y is not None and t is not None]
        whole = _apart(pairs)
        if whole is None:
            self.notes.append(
                "no gap between the modes: the outputs hold no floating tensors, or these differ in shape"
            )
            return None, {}
        by_layer: dict[str, float] = {}
        left_out = []
        for one in named:
            if self.pace.over:
                left_out.append(one.name)
                continue
            value = self._switched(parts_of(one))
            if value is not None:
                by_layer[one.name] = value
        if left_out:
            self.pace.left_out.append(f"what each of these layers alone adds to the train/eval gap: {some(left_out)}")
        layers = {part for one in layers_of(self.model) for part in parts_of(one)}
        rest = [m for m in self.model.modules() if m not in layers and reads_mode(m)]
        elsewhere: float | None = 0.0
        if rest and self.pace.over:
            elsewhere = None
        elif rest:
            elsewhere = self._switched(rest)
        seen = train[: len(self.outputs)]
        return (
            records.Gap(
                whole,
                sum(value for _, value in seen) / len(seen),
                sum(self.losses) / len(self.losses) if self.losses else None,
                elsewhere,
            ),
            by_layer,
        )

    def _switched(self, modules: Sequence[nn.Module]) -> float | None:
        """The gap with these modules alone in train mode; None where they cannot be."""
        pairs = []
        with modes_kept(modules):
            for module in modules:
                module.training = True
            for batch, reference in zip(self.batches[:BATCHES], self.outputs, strict=False):
                try:
                    with state_kept(*modules):
                        output = main_tensor(batch.call(self.model))
                except DiagnosisError:
                    return None  # such as a container that asks for targets in train mode
                self.pace.step()
                if reference is not None and output is not None:
                    pairs.append((reference, output.detach()))
        return _apart(pairs)


def passes(named: Sequence[Named], batches: int) -> int:
    """How many forward passes all of it takes, at most: in train mode, in eval mode, with each layer switched."""
    return 2 * batches + len(named) * min(batches, BATCHES)


def parts_of(named: Named) -> list[nn.Module]:
    """A layer, with what is a part of it: a parametrization, an attention's output projection."""
    if named.role != "other":
        return list(named.module.modules())
    parametrizations = named.module._modules.get("parametrizations")
    return [named.module, *(parametrizations.modules() if parametrizations is not None else ())]


def matters(named: Named) -> bool:
    """Whether the mode makes a difference to a layer."""
    module = named.module
    if is_frozen(module):
        return False
    kind = norm_kind(module)
    if kind == "renorm" or (
        kind in ("batch", "instance") and getattr(norm_of(module), "running_mean", None) is not None
    ):
        return True
    if named.role == "dropout" and bool(getattr(module, "p", 1.0)):
        return True
    if named.role == "attention" and bool(getattr(module, "dropout", 0.0)):
        return True
    if named.role == "recurrent":
        own = getattr(module, "recurrence", None)
        stacked = bool(getattr(module, "dropout", 0.0)) and getattr(module, "num_layers", 1) > 1
        if stacked or (own is not None and (own.norm == "batch" or bool(own.zoneout))):
            return True
    return any(reads_mode(part) for part in parts_of(named))


def reads_mode(module: nn.Module) -> bool:
    """Whether code of a module's own class, or of a hook on it, reads `training`.

    torch's and this library's classes are not read: what the mode is to them `matters` knows.
    """
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    own = [value for value in vars(module).values() if callable(value) and not isinstance(value, (nn.Module, type))]
    package = type(module).__module__.partition(".")[0]
    seen: set[CodeType] = set()
    return any(_reads(_function(f), package, seen) for f in (*_methods(type(module)), *own, *hooks))


def _methods(cls: type) -> Iterator[Any]:
    for base in cls.__mro__:
        if not base.__module__.startswith(("torch.nn.modules", "normwise.nn")) and base is not object:
            for value in vars(base).values():
                yield from (value.fget, value.fset) if isinstance(value, property) else (value,)


def _function(called: Any) -> Any:
    """The function that runs when something is called: it may be a method, a partial, or an object with `__call__`."""
    called = inspect.unwrap(getattr(called, "func", called)) if callable(called) else called
    called = getattr(called, "__func__", called)
    return called if isinstance(called, FunctionType) else inspect.getattr_static(type(called), "__call__", None)


def _reads(function: Any, package: str, seen: set[CodeType]) -> bool:
    """Whether a function, or one of the same package that it calls, names `training`."""
    if not isinstance(function, FunctionType) or function.__code__ in seen:
        return False
    seen.add(function.__code__)
    names = set(_names(function.__code__))
    if "training" in names:
        return True
    found = [function.__globals__.get(name) for name in names]
    found += [getattr(m, name, None) for m in found if isinstance(m, ModuleType) for name in names]
    helpers = [f for f in found if isinstance(f, FunctionType) and f.__module__.partition(".")[0] == package]
    return any(_reads(_function(helper), package, seen) for helper in helpers)


def _names(code: CodeType) -> Iterator[str]:
    """The names, and the strings (`getattr(self, "training")`), in a function and in those inside it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
        elif isinstance(constant, str):
            yield constant


def count_nonfinite(value: Any) -> int:
    """How many values of the tensors in it are NaN or infinite."""
    floating = [t.detach() for t in all_tensors(value) if t.is_floating_point() and not t.is_nested]
    return sum(int((~torch.isfinite(t)).sum()) for t in floating)


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
