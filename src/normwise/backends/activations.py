"""What follows a norm inside the same call: a residual, an activation, and the layout of the input."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from normwise.backends.channels import channels_last


def _hardsigmoid(z: Tensor) -> Tensor:
    """torch's derivative of it is 1/6 in float32's digits, in float64 too."""
    return F.hardtanh(z, -3, 3) / 6 + 0.5 if z.dtype is torch.float64 else F.hardsigmoid(z)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,  # slope 0.01 below 0, torch's default
    "silu": F.silu,
    "gelu": F.gelu,  # the exact one, by erf
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "hardsigmoid": _hardsigmoid,
    "elu": F.elu,  # alpha 1
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "softplus": F.softplus,  # beta 1; z itself above 20
    "mish": F.mish,
}
# Of the gate of a norm.
GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "relu": F.relu,
}
_OTHER_NAMES = {"swish": "silu", "leakyrelu": "leaky_relu", "lrelu": "leaky_relu", "gelutanh": "gelu_tanh"}
_OTHER_NAMES |= {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "hard_swish": "hardswish"}
_OTHER_NAMES |= {"hswish": "hardswish", "hard_sigmoid": "hardsigmoid"}
_NOT_0_AT_0 = ("hardsigmoid", "softplus")


def _meant(act: object) -> str:
    """What to write instead of a module, a function or another name of an activation; else where it goes."""
    if isinstance(act, str):
        name = _OTHER_NAMES.get(act.lower(), act.lower())
    else:
        kind = act if isinstance(act, type) else type(act)
        name = kind.__name__ if issubclass(kind, torch.nn.Module) else getattr(act, "__name__", "")
        name = _OTHER_NAMES.get(name.lower(), name.lower())
        if name == "gelu" and getattr(act, "approximate", "none") == "tanh":
            name = "gelu_tanh"
        if (name == "leaky_relu" and getattr(act, "negative_slope", 0.01) != 0.01) or getattr(act, "alpha", 1.0) != 1:
            name = ""  # with a constant that no name stands for
    if name in ACTIVATIONS:
        return f": write act={name!r}"
    return "; any other goes behind the layer, as nn.Sequential(norm, nn.Tanh())"


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The function called `name`; ValueError names the known ones."""
    if not isinstance(name, str) or name not in ACTIVATIONS:
        known = ", ".join(map(repr, ACTIVATIONS))
        raise ValueError(f"unknown act {name!r}: expected one of {known} or None{_meant(name)}")
    return ACTIVATIONS[name]


def add_residual_and_activate(y: Tensor, residual: Tensor | None, act: str | None, mask: Tensor | None) -> Tensor:
    """act(y + residual), where `y` is a norm's output and so 0 at invalid positions; it stays so."""
    if residual is not None:
        # Before the sum: act's slope at NaN would spoil the gradient 0 that comes from after it.
        y = y + (residual if mask is None else residual.masked_fill(~mask, 0))
    if act is None:
        return y
    y = ACTIVATIONS[act](y)
    return y.masked_fill(~mask, 0) if mask is not None and act in _NOT_0_AT_0 else y


def channels_laid_out_like(y: Tensor, x: Tensor) -> Tensor:
    """`y` with its channels last in memory where those of `x` are."""
    return y.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last(x) else y
