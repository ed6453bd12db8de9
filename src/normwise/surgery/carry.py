"""Building a layer in the place of another: its arguments, tensors, hooks, mode and all that a user may hold on to."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from normwise.nn.construct import offset_of
from normwise.surgery.freeze import is_frozen, keep_frozen
from normwise.surgery.report import Refusal
from normwise.surgery.select import kind_of, known_base

# Constructor arguments that no attribute of the same name holds.
_SPECIAL = ("self", "device", "dtype", "bias")


def rebuild(old: nn.Module, cls: type[nn.Module], names: Iterable[str] | None = None, **given: Any) -> nn.Module:
    """A `cls` with the arguments `given`, and for the others what `old` was given under the same name, if anything.

    Args:
        names: these others; None: all that both constructors take.

    Its tensors are its own and freshly started, on the device and in the dtype of those of `old`; the global random
    state stays as it was.
    """
    accepted = inspect.signature(cls.__init__).parameters
    if names is None:
        told = inspect.signature(known_base(old)).parameters
        names = [name for name in accepted if name in told and name not in _SPECIAL and _has(old, name)]
    arguments = {name: vars(old)[name] if name in vars(old) else getattr(old, name) for name in names}
    if "eps" in arguments and arguments["eps"] is None and accepted["eps"].default is not None:
        # An RMSNorm's, which stands for the machine epsilon of the dtype that it computes in.
        kinds = [t.dtype for t in (*old.parameters(), *old.buffers()) if t.is_floating_point()]
        arguments["eps"] = torch.finfo(torch.float64 if torch.float64 in kinds else torch.float32).eps
    if "bias" in accepted and "bias" not in given:
        bias = getattr(old, "bias", None)
        arguments["bias"] = bias if isinstance(bias, bool) else getattr(old, "weight", None) is None or bias is not None
    tensors = [*old.parameters(), *(b for b in old.buffers() if b.is_floating_point())]
    if tensors:
        arguments["device"], arguments["dtype"] = tensors[0].device, tensors[0].dtype
    devices = [tensors[0].device] if tensors and tensors[0].is_cuda else []
    with torch.random.fork_rng(devices=devices):
        new = cls(**{**arguments, **given})
    if "bias" not in accepted and "bias" not in given and getattr(old, "bias", None) is None:
        new.register_parameter("bias", None)  # torch before 2.13 knows no `bias=`
    return new


def _has(layer: nn.Module, name: str) -> bool:
    """Whether it keeps one: a layer with an activation does not hand out its eps, and here `act` goes along."""
    return name in vars(layer) or hasattr(layer, name)


def carry_tensors(old: nn.Module, new: nn.Module, *, statistics: bool = True, but: Sequence[str] = ()) -> list[str]:
    """Give `new` the very tensors that `old` has under the same names: parameters stay the same objects, so that an
    optimizer that holds them goes on, and layers that share one still do.

    A parametrized tensor keeps its parametrization. What is a parameter here and a buffer there is copied.

    Args:
        statistics: carry buffers too.
        but: names of those to be left out.

    Returns:
        The names of the buffers that were left behind.

    Raises:
        Refusal: `old` has a parameter that `new` has no place for, or a weight that would be another gain there.
    """
    left = []
    before, after = offset_of(old), offset_of(new)
    if before != after and getattr(old, "weight", None) is not None:
        is_stored, would_be = (f"{offset} + weight" if offset else "its weight" for offset in (before, after))
        raise Refusal(
            f"its gain is {is_stored}, but that of the {kind_of(new)} would be {would_be}, and parameters stay the "
            "same objects: give the new layer the same offset, or put the old one's into its weight first "
            "(layer.weight.data += layer.offset; layer.offset = 0.0)"
        )
    for name in _tensor_names(old):
        value = getattr(old, name)
        if value is None or name in but:
            continue
        buffer = name in old._buffers
        place = getattr(new, name, None)
        if place is None or place.shape != value.shape or (buffer and not statistics):
            if not buffer or isinstance(place, nn.Parameter):
                raise Refusal(f"its {name} of shape {tuple(value.shape)} has no place in a {type(new).__name__}")
            left.append(name)
        elif name in new._buffers:
            new._buffers[name] = value if buffer else value.detach().clone()
        elif parametrize.is_parametrized(old, name):
            parametrize.register_parametrization(new, name, nn.Identity(), unsafe=True)
            new.parametrizations[name] = old.parametrizations[name]  # type: ignore[operator,index]
        else:
            setattr(new, name, nn.Parameter(value.clone()) if buffer else value)
    return left


def _tensor_names(layer: nn.Module) -> list[str]:
    parametrized = list(layer.parametrizations) if parametrize.is_parametrized(layer) else []  # type: ignore[arg-type]
    return [*layer._parameters, *layer._buffers, *parametrized]


def carry_mode(old: nn.Module, new: nn.Module, names: Mapping[str, str]) -> str:
    """Give `new` the mode of `old`, through every `train()` if `freeze` froze it; returns what did not carry over, ""
    if all did. `names`: what the tensors of `old` are called in `new`, if not the same."""
    new.train(old.training)
    return keep_frozen(old, new, names) if is_frozen(old) else ""
