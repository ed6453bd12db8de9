"""Puts a model, its optimizer, the loader and the random state back as they were, bit for bit, whatever happens."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from normwise.measure.eager import run_eagerly
from normwise.measure.snapshot import RandomState, Values


@contextmanager
def preserved(model: nn.Module, optimizer: torch.optim.Optimizer | None = None, loader: Any = None) -> Iterator[None]:
    """Restores all of these afterwards, also after an error or an interrupt.

    Kept are parameters (the optimizer's too) and buffers (the very tensors, with their values), gradients, modes and
    other attributes of every module (lists, dicts and sets among them one level deep), the optimizer's state and
    settings, and the random states of torch on all devices, of Python, of NumPy where it is loaded, and of the loader's
    own generator.
    """
    with ExitStack() as undo:
        undo.callback(RandomState(generators_of(loader)).restore)
        # Modules first, tensors after them: `_attributes` brings back the tensors whose values then return.
        stepped = [] if optimizer is None else [p for group in optimizer.param_groups for p in group["params"]]
        parameters = [*model.parameters(), *stepped]
        undo.callback(Values([*parameters, *model.buffers()]).restore)
        undo.callback(_all, [_gradient(p) for p in parameters])
        undo.callback(_all, [_attributes(module) for module in model.modules()])
        _swap_buffers_for_copies(model)
        if optimizer is not None:
            undo.callback(_optimizer(optimizer))
        undo.enter_context(run_eagerly())
        with torch.inference_mode(False), torch.enable_grad():
            yield


def _swap_buffers_for_copies(model: nn.Module) -> None:
    """Replaces all buffers by copies, until `_attributes` puts the originals back.

    A forward pass in train mode writes running statistics; the originals may stand in a graph that the caller still
    holds, and writing to them, even the same values, would spoil it.
    """
    copies: dict[int, Tensor] = {}
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = copies.setdefault(id(buffer), buffer.detach().clone())


def _all(calls: list[Callable[[], None]]) -> None:
    for call in calls:
        call()


def _gradient(parameter: nn.Parameter) -> Callable[[], None]:
    """`grad` is only ever replaced here, never written to, so the tensor itself is all there is to keep."""
    kept = parameter.grad

    def restore() -> None:
        parameter.grad = kept

    return restore


def _attributes(module: nn.Module) -> Callable[[], None]:
    """Everything in a module's `__dict__`: its mode, hooks, counters, and which tensors and children it has."""
    kept = dict(vars(module))
    contents = {name: copy.copy(value) for name, value in kept.items() if isinstance(value, (dict, list, set))}
    tensors = Values(value for value in kept.values() if isinstance(value, Tensor))

    def restore() -> None:
        own = vars(module)
        for name in own.keys() - kept.keys():
            del own[name]
        own.update(kept)
        for name, content in contents.items():
            held: Any = kept[name]
            if not _same_objects(held, content):
                held.clear()
                held.extend(content) if isinstance(held, list) else held.update(content)
        tensors.restore()

    return restore


def _same_objects(a: Any, b: Any) -> bool:
    """Whether two containers of one kind hold the very same objects."""
    if len(a) != len(b):
        return False
    if isinstance(a, dict):
        return all(p is q and a[p] is b[q] for p, q in zip(a, b, strict=True))
    return all(p is q for p, q in zip(a, b, strict=True))


def _optimizer(optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    own = {name: value for name, value in vars(optimizer).items() if name not in ("state", "param_groups")}
    state = {parameter: dict(entries) for parameter, entries in optimizer.state.items()}
    settings = [*state.values(), *optimizer.param_groups]
    tensors = Values(v for entries in settings for v in entries.values() if isinstance(v, Tensor))
    others = {p: {k: copy.deepcopy(v) for k, v in e.items() if not isinstance(v, Tensor)} for p, e in state.items()}
    groups = [dict(group) for group in optimizer.param_groups]
    members = [list(group["params"]) for group in groups]

    def restore() -> None:
        for name in vars(optimizer).keys() - own.keys() - {"state", "param_groups"}:
            delattr(optimizer, name)
        vars(optimizer).update(own)
        for parameter in list(optimizer.state):
            if parameter not in state:
                del optimizer.state[parameter]
        for parameter, entries in state.items():
            held = optimizer.state[parameter]
            held.clear()
            held.update(entries | others[parameter])
        optimizer.param_groups[:] = optimizer.param_groups[: len(groups)]
        for group, kept, params in zip(optimizer.param_groups, groups, members, strict=True):
            group.clear()
            group.update(kept)
            group["params"][:] = params
        tensors.restore()

    return restore


def generators_of(loader: Any) -> list[torch.Generator]:
    """A loader's own, and those of its samplers, which may be wrapped."""
    owners = [loader]
    for owner in owners:
        inner = (getattr(owner, name, None) for name in ("sampler", "batch_sampler"))
        owners += [one for one in inner if one is not None and not any(one is known for known in owners)]
    found = [getattr(owner, "generator", None) for owner in owners]
    return [g for g in {id(g): g for g in found}.values() if isinstance(g, torch.Generator)]
