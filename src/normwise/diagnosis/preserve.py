"""Puts a model, its optimizer, the loader and the random state back as they were, bit for bit, whatever happens."""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@contextmanager
def preserved(model: nn.Module, optimizer: torch.optim.Optimizer | None = None, loader: Any = None) -> Iterator[None]:
    """What is done inside leaves no trace in any of these, be it done, refused or interrupted.

    Kept are parameters (the optimizer's too) and buffers (the very tensors, with their values), gradients, modes and
    other attributes of every module (lists, dicts and sets among them one level deep), the optimizer's state and
    settings, and the random states of torch on all devices, of Python, of NumPy where it is loaded, and of the loader's
    own generator.
    """
    with ExitStack() as undo:
        undo.callback(_randomness(loader))
        # Modules first, tensors after them: `_restore_attributes` brings back the tensors whose values then return.
        stepped = [] if optimizer is None else [p for group in optimizer.param_groups for p in group["params"]]
        parameters = {id(p): p for p in (*model.parameters(), *stepped)}
        buffers = {id(b): b for b in model.buffers()}
        undo.callback(_all, [_tensor(t) for t in (parameters | buffers).values()])
        undo.callback(_all, [_gradient(p) for p in parameters.values()])
        undo.callback(_all, [_attributes(module) for module in model.modules()])
        _lend_buffers(model)
        if optimizer is not None:
            undo.callback(_optimizer(optimizer))
        undo.enter_context(_eager(model))
        with torch.inference_mode(False), torch.enable_grad():
            yield


def _lend_buffers(model: nn.Module) -> None:
    """Copies in the places of all buffers, until `_attributes` puts the originals back.

    A forward pass in train mode writes running statistics; the originals may stand in a graph that the caller still
    holds, and writing to them, even the same values, would spoil it.
    """
    copies: dict[int, Tensor] = {}
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = copies.setdefault(id(buffer), buffer.detach().clone())


@contextmanager
def _eager(model: nn.Module) -> Iterator[None]:
    """Compiled parts run as they are written, so that hooks see them."""
    compiled = any(hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) for m in model.modules())
    if not compiled:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def buffers_kept(*modules: nn.Module) -> Iterator[None]:
    """Running statistics and other buffers of these modules have their values again afterwards."""
    restores = [_tensor(b) for b in {id(b): b for module in modules for b in module.buffers()}.values()]
    try:
        yield
    finally:
        _all(restores)


def _all(calls: list[Callable[[], None]]) -> None:
    for call in calls:
        call()


@torch.no_grad()
def _tensor(tensor: Tensor) -> Callable[[], None]:
    kept = tensor.detach().clone()

    @torch.no_grad()
    def restore() -> None:
        # Untouched tensors stay untouched: writing to one would spoil a graph that the caller still holds.
        if not same_bits(tensor, kept):
            tensor.detach().copy_(kept)

    return restore


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bytes: NaN equals the same NaN, 0.0 is not -0.0."""
    a, b = (torch.view_as_real(t) if t.is_complex() else t for t in (a.detach(), b.detach()))
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.layout == torch.strided and a.element_size() in INTEGERS and not a.is_quantized:
        kind = INTEGERS[a.element_size()]
        return torch.equal(a.view(kind), b.view(kind))
    return False


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
    tensors = [_tensor(value) for value in kept.values() if isinstance(value, Tensor)]

    def restore() -> None:
        own = vars(module)
        for name in own.keys() - kept.keys():
            del own[name]
        own.update(kept)
        for name, content in contents.items():
            held: Any = kept[name]
            if not _same_things(held, content):
                held.clear()
                held.extend(content) if isinstance(held, list) else held.update(content)
        _all(tensors)

    return restore


def _same_things(a: Any, b: Any) -> bool:
    """Whether two containers of one kind hold the very same objects."""
    if len(a) != len(b):
        return False
    if isinstance(a, dict):
        return all(p is q and a[p] is b[q] for p, q in zip(a, b, strict=True))
    return all(p is q for p, q in zip(a, b, strict=True))


def _optimizer(optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    own = {name: value for name, value in vars(optimizer).items() if name not in ("state", "param_groups")}
    state = {parameter: dict(entries) for parameter, entries in optimizer.state.items()}
    tensors = [_tensor(v) for entries in state.values() for v in entries.values() if isinstance(v, Tensor)]
    others = {p: {k: copy.deepcopy(v) for k, v in e.items() if not isinstance(v, Tensor)} for p, e in state.items()}
    groups = [dict(group) for group in optimizer.param_groups]
    members = [list(group["params"]) for group in groups]
    tensors += [_tensor(v) for group in groups for v in group.values() if isinstance(v, Tensor)]

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
        _all(tensors)

    return restore


def _randomness(loader: Any) -> Callable[[], None]:
    """The random states of torch, Python, NumPy and the loader; devices that nobody has used yet stay unused."""
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    numpy = sys.modules.get("numpy")
    numpy_state = None if numpy is None else numpy.random.get_state()
    sampler = getattr(loader, "sampler", None)
    found = {id(g): g for g in (getattr(loader, "generator", None), getattr(sampler, "generator", None))}
    generators = [(g, g.get_state()) for g in found.values() if isinstance(g, torch.Generator)]

    def restore() -> None:
        torch.set_rng_state(torch_state)
        random.setstate(python_state)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        if numpy is not None:
            numpy.random.set_state(numpy_state)
        for generator, state in generators:
            generator.set_state(state)

    return restore
