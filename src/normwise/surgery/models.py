"""Checks and copies of models before their layers are replaced."""

from __future__ import annotations

import copy

import torch
from torch import nn

from normwise.surgery.forwards import is_bound, reached
from normwise.surgery.select import kind_of, require_module


def changeable(verb: str, model: nn.Module) -> None:
    """Raises TypeError for what is no model, or one whose layers something outside has taken note of."""
    require_module(verb, model)
    for name, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(f"{name or 'the model'} is a ScriptModule, whose layers are fixed: {verb} before scripting")
        if kind in ("DistributedDataParallel", "FullyShardedDataParallel", "OptimizedModule"):
            raise TypeError(
                f"{name or 'the model'} is of class {kind}, which has taken note of the layers inside: {verb} the "
                "model before it is wrapped"
            )


def copied(model: nn.Module, verb: str) -> nn.Module:
    """A copy that does not depend on the original."""
    try:
        new = copy.deepcopy(model)
    except Exception as error:
        raise type(error)(f"{error}\n{verb} could not copy the model: pass inplace=True to change it itself") from error
    originals = {id(module) for module in model.modules()}
    for name, module in new.named_modules():
        if is_bound(module) and any(id(other) in originals for other in reached(vars(module)["forward"])):
            raise ValueError(
                f"{name or 'the model'} ({kind_of(module)}) has a forward bound to this very instance, which calls "
                f"modules of the model by itself: in a copy it would go on calling the original's. {verb} with "
                "inplace=True, or take that forward off first"
            )
    return new
