"""What `convert` puts in the place of one recurrent layer or cell."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

import normwise.nn as ours
from normwise.nn import recurrent_parameters as parameters
from normwise.nn.recurrent_base import Recurrent
from normwise.surgery.carry import carry_tensors, rebuild
from normwise.surgery.report import AlreadyOne, Refusal
from normwise.surgery.select import has_norm, known_base

_SIZES = ("input_size", "hidden_size")
_LAYER = (*_SIZES, "num_layers", "batch_first", "dropout", "bidirectional")
# What stands between layers, which torch.nn's have nothing of.
_BETWEEN = ("between", "residual")
# torch.nn's layers take *args and **kwargs, and refuse what is not theirs.
_ARGUMENTS = {
    "RNN": (*_LAYER, "nonlinearity"),
    "GRU": _LAYER,
    "LSTM": (*_LAYER, "proj_size"),
    "RNNCell": (*_SIZES, "nonlinearity"),
    "GRUCell": _SIZES,
    "LSTMCell": _SIZES,
}


def normalized(layer: nn.Module, norm: str, **options: Any) -> tuple[nn.Module, str]:
    """normwise's layer of the same cell, with norms inside.

    The weights are that layer's. Its biases stand behind the norms; where the recurrence has one bias for torch's
    two, it is their sum. Gains start as the variant says.
    """
    if has_norm(layer):
        raise Refusal(f"has norm={layer.recurrence.norm!r} inside already")
    if "forget_bias" in options:
        raise TypeError("convert keeps the layers' biases: set forget_bias on these")
    name = _name(layer)
    names = (*_ARGUMENTS[name], *(_BETWEEN if isinstance(layer, Recurrent) else ()))
    new = rebuild(layer, getattr(ours, name), names, bias=layer.bias, norm=norm, **options)
    places = [suffix for _, suffix in new._places()] if isinstance(new, Recurrent) else [""]
    summed = [s for s in places if hasattr(layer, f"bias_hh{s}") and not hasattr(new, f"bias_hh{s}")]
    biases = [(f"bias_ih{suffix}", f"bias_hh{suffix}") for suffix in summed]
    if any(parametrize.is_parametrized(layer, name) for pair in biases for name in pair):
        raise Refusal("its two biases become one, but one of them is parametrized")
    carry_tensors(layer, new, but=[name for pair in biases for name in pair])
    for suffix, pair in zip(summed, biases, strict=True):
        parameters.copy_from_torch(new, layer, suffix)
        new.get_parameter(pair[0]).requires_grad_(any(getattr(layer, name).requires_grad for name in pair))
    return new, "weights carried, gains as the variant starts them" + (", biases summed" if summed else "")


def namesake(layer: nn.Module, home: ModuleType) -> tuple[nn.Module, str]:
    """The layer of the same name in torch.nn or normwise.nn, which computes the same."""
    torch_home = home is nn
    if known_base(layer).__module__.startswith("torch." if torch_home else "normwise."):
        raise AlreadyOne()
    if has_norm(layer):
        raise Refusal(f"torch.nn has no layer with norm={layer.recurrence.norm!r} inside")
    if isinstance(layer, Recurrent) and parameters.between_of(layer) is not None:
        raise Refusal(
            f"torch.nn's layer has nothing but dropout between layers, this one between={layer.between!r} and "
            f"residual={layer.residual}"
        )
    name = _name(layer)
    if torch_home and parametrize.is_parametrized(layer):
        raise Refusal("torch.nn's recurrent layers do not look at a parametrization: remove_parametrizations first")
    new = rebuild(
        layer, getattr(home, name), _ARGUMENTS[name], bias=layer.bias, **({} if torch_home else {"norm": None})
    )
    carry_tensors(layer, new)
    return new, ""


def _name(layer: nn.Module) -> str:
    """RNN, GRU, LSTM or one of their cells; refuses what is none of these, or more than torch.nn's."""
    name = known_base(layer).__name__
    if name not in _ARGUMENTS:
        raise Refusal(f"there is no normalized {name}")
    config = getattr(layer, "recurrence", None)
    if config is not None and config.norm is None and not config.is_torch_layer:
        raise Refusal("its zoneout, or another option of its recurrence, is unknown to torch.nn's layer")
    return name
