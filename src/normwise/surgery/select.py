"""Which layers of a model an operation is about."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from torch import nn
from torch.nn.utils import parametrize

from normwise.nn import recurrent_base, recurrent_cells
from normwise.nn.frozen_batch_norm import FrozenBatchNorm

Where: TypeAlias = str | type | tuple[str | type, ...] | Callable[[str, nn.Module], bool] | None

BATCH = (nn.modules.batchnorm._BatchNorm, FrozenBatchNorm)
INSTANCE = (nn.modules.instancenorm._InstanceNorm,)
BY_SAMPLE = (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, *INSTANCE)
NORMS = (*BATCH, *BY_SAMPLE)
RECURRENT = (nn.modules.rnn.RNNBase, nn.modules.rnn.RNNCellBase)


class Layer:
    """A layer and all the places of the model where it stands.

    names: of these places, "" for the model itself.
    """

    def __init__(self, module: nn.Module, names: list[str]) -> None:
        self.module, self.names = module, names

    @property
    def name(self) -> str:
        return ", ".join(self.names)

    @property
    def kind(self) -> str:
        """Its class, as the user wrote it."""
        return kind_of(self.module)


def class_of(module: nn.Module) -> type[nn.Module]:
    """The class of `module` without what torch's parametrizations make of it."""
    return parametrize.type_before_parametrizations(module)


def kind_of(module: nn.Module) -> str:
    """The name of its class: nn.X for torch's, normwise.X for ours, X for the user's own."""
    cls = class_of(module)
    home = {"torch.nn": "nn.", "normwise.nn": "normwise."}.get(".".join(cls.__module__.split(".")[:2]), "")
    return home + cls.__name__


def known_base(layer: nn.Module) -> type[nn.Module]:
    """The class of torch.nn or of normwise that `layer` is of, or derived from."""
    return next(cls for cls in class_of(layer).__mro__ if cls.__module__.startswith(("torch.nn.", "normwise.")))


def option(layer: nn.Module, name: str) -> Any:
    """The value of `layer`'s argument `name`, None where its known base has no such argument.

    What a user's class calls so by itself (its width `dim`, its module `act`) is something else.
    """
    return getattr(layer, name, None) if name in inspect.signature(known_base(layer)).parameters else None


def require_module(verb: str, model: nn.Module) -> None:
    """Raises TypeError for what is no model."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{verb} expects a torch.nn.Module, but got {instead_of_model(model)}")


def instead_of_model(given: Any) -> str:
    """What was given in the place of a model, with the way to one where the slip is a common one."""
    if isinstance(given, type) and issubclass(given, nn.Module):
        return f"the class {given.__name__}: make a model of it first, {given.__name__}(...)"
    if isinstance(given, Iterator) or (isinstance(given, list) and any(isinstance(p, nn.Parameter) for p in given)):
        return f"{type(given).__name__}: give the model itself, not model.parameters()"
    return type(given).__name__


def layers(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> list[Layer]:
    """The model's layers of these classes, each once, in the model's order."""
    found: dict[int, Layer] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, kinds):
            found.setdefault(id(module), Layer(module, [])).names.append(name)
    return list(found.values())


def has_norm(module: nn.Module) -> bool:
    """Whether a recurrent layer or cell has norms inside."""
    if isinstance(module, (recurrent_base.Recurrent, recurrent_cells._Cell)):
        return module.recurrence.norm is not None
    return False


def chosen(candidates: list[Layer], where: Where) -> Callable[[Layer], bool]:
    """Whether a layer is one of those that `where` means.

    Args:
        candidates: all the layers there are to choose from.
        where: a pattern of names ("backbone.*", as in a shell), a class, several of these, or a function of name and
            module; None means every layer.

    Raises:
        ValueError: no candidate is meant. TypeError: `where` is something else.
    """
    if where is None:
        return lambda layer: True

    def meant(layer: Layer) -> bool:
        return any(_matches(where, name, layer.module) for name in layer.names)

    if candidates and not any(meant(layer) for layer in candidates):
        names = ", ".join(repr(name) for name in _some([layer.name for layer in candidates]))
        raise ValueError(
            f"where={where!r} means none of the model's layers: expected a pattern of names, a class or a function of "
            f"name and module that fits at least one of {names}"
        )
    return meant


def _matches(where: Where, name: str, module: nn.Module) -> bool:
    if isinstance(where, str):
        return fnmatchcase(name, where)
    if isinstance(where, type):
        return isinstance(module, where)
    if isinstance(where, tuple):
        return any(_matches(part, name, module) for part in where)
    if callable(where):
        return bool(where(name, module))
    raise TypeError(
        f"where must be a pattern of names, a class, a tuple of these, or a function of name and module, but got "
        f"{type(where).__name__}"
    )


def _some(names: list[str], most: int = 5) -> Iterator[str]:
    yield from names[:most]
    if len(names) > most:
        yield f"... ({len(names)} in all)"
