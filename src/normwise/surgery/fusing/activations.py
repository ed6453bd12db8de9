"""Which of the kernels' activations a module or a call of a function is."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from normwise.backends.activations import ACTIVATIONS
from normwise.surgery.forwards import is_bound

# For each activation of the kernels, what its arguments must be: where they are not, it is another function.
_NEEDS: dict[str, dict[str, Any]] = {
    "relu": {},
    "leaky_relu": {"negative_slope": 0.01},
    "silu": {},
    "gelu": {"approximate": "none"},
    "relu6": {},
    "hardswish": {},
    "hardsigmoid": {},
    "elu": {"alpha": 1.0},
    "softplus": {"beta": 1.0, "threshold": 20.0},
    "mish": {},
}
_MODULES: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.LeakyReLU: "leaky_relu",
    nn.SiLU: "silu",
    nn.GELU: "gelu",
    nn.ReLU6: "relu6",
    nn.Hardswish: "hardswish",
    nn.Hardsigmoid: "hardsigmoid",
    nn.ELU: "elu",
    nn.Softplus: "softplus",
    nn.Mish: "mish",
}
_FUNCTIONS: dict[Callable[..., Any], str] = {
    **{getattr(F, name): name for name in _NEEDS},
    **dict.fromkeys((torch.relu, torch.relu_, F.relu_), "relu"),
    F.leaky_relu_: "leaky_relu",
    F.elu_: "elu",
}
_METHODS = {"relu": "relu", "relu_": "relu"}
# The parameters of functions that torch does not write in Python, and so cannot be asked for them.
_BUILTIN = {
    "leaky_relu": ("input", "negative_slope"),
    "elu": ("input", "alpha"),
    "gelu": ("input", "approximate"),
    "softplus": ("input", "beta", "threshold"),
}


def named(module: nn.Module) -> str | None:
    """What `act=` calls the activation that a module of torch.nn is; None where it is none that the kernels have, with
    its arguments, or where hooks look on or a forward is bound to it."""
    cls = type(module)
    if cls is nn.Hardtanh:
        found = "relu6" if module.min_val == 0 and module.max_val == 6 else None
    else:
        found = _MODULES.get(cls)
        needs = {} if found is None else _NEEDS[found]
        if any(getattr(module, name) != value for name, value in needs.items()):
            found = "gelu_tanh" if found == "gelu" and module.approximate == "tanh" else None
    return found if found in ACTIVATIONS and not is_hooked(module) and not is_bound(module) else None


def is_hooked(module: nn.Module) -> bool:
    """Whether hooks see what goes into the module or comes out of it."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def is_activation(module: nn.Module) -> bool:
    """Whether it is one of the activations that the kernels may know, whatever its arguments."""
    return type(module) in _MODULES or type(module) is nn.Hardtanh


def named_call(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
    """What `act=` calls the activation that a call of a function, or of a method by its name, is; None for any other.

    Args:
        target: the function, or the name of the method.
        args: with the input as the first.
    """
    if isinstance(target, str):
        found = _METHODS.get(target) if len(args) == 1 and not kwargs else None
        return found if found in ACTIVATIONS else None
    try:
        if target is F.hardtanh or target is F.hardtanh_:
            given = _bound(F.hardtanh, args, kwargs)
            found = "relu6" if given["min_val"] == 0 and given["max_val"] == 6 else None
        else:
            found = _FUNCTIONS.get(target)
            if found is not None and (needs := _NEEDS[found]):
                given = _arguments(target, found, args, kwargs)
                if any(given.get(name, value) != value for name, value in needs.items()):
                    found = "gelu_tanh" if given.get("approximate") == "tanh" else None
    except TypeError:  # not hashable, or not the arguments of this function
        return None
    return found if found in ACTIVATIONS else None


def _arguments(target: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    try:
        return _bound(target, args, kwargs)
    except ValueError:
        return {**dict(zip(_BUILTIN[name], args, strict=False)), **kwargs}


def _bound(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    given = inspect.signature(function).bind(*args, **kwargs)
    given.apply_defaults()
    return given.arguments


SUMS: tuple[Any, ...] = (operator.add, torch.add, "add", "add_", "__add__")
