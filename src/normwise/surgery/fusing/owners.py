"""Modules with a fused forward: of a class derived from their own, whose forward is the fused graph where that holds,
and their own otherwise."""

from __future__ import annotations

import importlib
import inspect
import keyword
import linecache
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from types import ModuleType
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from normwise.surgery.fusing.follow import MISSING, Followed, Given, InModule, OfClass, Present, Read
from normwise.surgery.fusing.observe import InNorm, unswap


class _Way(NamedTuple):
    """One way through a forward: its code, what the code names, and the condition on which it is taken."""

    code: str
    names: dict[str, Any]
    condition: str
    constants: dict[str, Any]


class Recipe(NamedTuple):
    """What a fused class is made of."""

    base: type[nn.Module]
    signature: str
    passed: str
    constants: dict[str, Any]
    ways: tuple[_Way, ...]


# Blocks of one kind share a class: torch.compile compiles it once.
_made: WeakValueDictionary[Any, type[nn.Module]] = WeakValueDictionary()


def is_fused(module: nn.Module) -> bool:
    """Whether its forward is a fused one."""
    return "_fused_recipe" in vars(type(module))


def is_touched(module: nn.Module) -> bool:
    """Whether `fuse` changed the module itself."""
    return is_fused(module) or isinstance(module, InNorm)


def fuse_forward(module: nn.Module, ways: list[Followed]) -> None:
    """Give the module a forward of these graphs."""
    base = type(module)
    signature, passed, defaults = _signature(base)
    written = {(way.code, way.condition, _items(way.constants)): way for way in map(_way, ways)}
    module.__class__ = _class(Recipe(base, signature, passed, defaults, tuple(written.values())))


def mark(norm: nn.Module) -> None:
    """Note that the norm took the place of one of another class when a model was fused."""
    vars(norm)["_by_fuse"] = True


def is_marked(norm: nn.Module) -> bool:
    """Whether `mark` noted it."""
    return "_by_fuse" in vars(norm)


class State:
    """The classes, parts and activations of a model's modules, to be put back after an error."""

    def __init__(self, model: nn.Module) -> None:
        self.kept = [(part, part.__class__, dict(part._modules), dict(vars(part))) for part in model.modules()]

    def put_back(self) -> None:
        """All as it was."""
        for module, cls, parts, attributes in self.kept:
            module.__class__ = cls
            module._modules.clear()
            module._modules.update(parts)
            vars(module).clear()
            vars(module).update(attributes)


@contextmanager
def unfused(model: nn.Module) -> Iterator[None]:
    """What `fuse` did to the model's modules is undone, unless there is an error inside: then it is as it was."""
    state = State(model)
    for module in model.modules():
        if is_fused(module):
            module.__class__ = vars(type(module))["_fused_recipe"].base
    unswap(model)
    try:
        yield
    except BaseException:
        state.put_back()
        raise


def _class(recipe: Recipe) -> type[nn.Module]:
    key = _key(recipe)
    found = _made.get(key)
    if found is None:
        found = _made[key] = _make(recipe)
    return found


def _make(recipe: Recipe) -> type[nn.Module]:
    base = recipe.base
    scope: dict[str, Any] = {"_base": base, "_Tensor": Tensor, **recipe.constants}
    lines = [f"def forward(self, {recipe.signature}):" if recipe.signature else "def forward(self):"]
    for n, way in enumerate(recipe.ways):
        scope[f"_way_{n}"] = _function(way, f"{base.__qualname__}.{n}")
        scope.update({f"_{n}{name}": value for name, value in way.constants.items()})
        arguments = ", ".join(("self", *_traced(way)))
        lines += [f"    if {way.condition.replace('@', f'_{n}')}:", f"        return _way_{n}({arguments})"]
    lines.append(f"    return _base.forward(self, {recipe.passed})")
    forward = _executed("\n".join(lines) + "\n", scope, f"{base.__qualname__}")["forward"]
    forward.__doc__ = base.forward.__doc__

    def reduce(self: nn.Module, protocol: Any) -> Any:
        made: Any = super(cls, self).__reduce_ex__(protocol)
        if isinstance(made, tuple) and made[0].__name__ == "__newobj__" and made[1] == (cls,):
            return (_blank, (_portable(recipe),), *made[2:])
        return made

    body = {
        "forward": forward,
        "__reduce_ex__": reduce,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "_fused_recipe": recipe,
    }
    meta: Any = type(base)
    cls: type[nn.Module] = meta(base.__name__, (base,), body)
    return cls


def _traced(way: _Way) -> list[str]:
    return list(way.constants["@traced"]) if "@traced" in way.constants else []


def _function(way: _Way, name: str) -> Any:
    return _executed(way.code, dict(way.names), name)["forward"]


def _executed(code: str, scope: dict[str, Any], name: str) -> dict[str, Any]:
    """Run definitions; their lines are shown in tracebacks."""
    file = f"<fused forward of {name} {len(linecache.cache)}>"
    linecache.cache[file] = (len(code), None, code.splitlines(keepends=True), file)
    exec(compile(code, file, "exec"), scope)
    return scope


def _signature(base: type[nn.Module]) -> tuple[str, str, dict[str, Any]]:
    """The parameters of the class's forward as they are written, how they are passed on, and the default values."""
    written, passed, defaults = [], [], {}
    starred = False
    parameters = list(inspect.signature(base.forward).parameters.values())[1:]
    for n, p in enumerate(parameters):
        if p.kind is p.VAR_POSITIONAL:
            starred = True
            written.append(f"*{p.name}")
            passed.append(f"*{p.name}")
            continue
        if p.kind is p.VAR_KEYWORD:
            written.append(f"**{p.name}")
            passed.append(f"**{p.name}")
            continue
        if p.kind is p.KEYWORD_ONLY and not starred:
            starred = True
            written.append("*")
        text = p.name
        if p.default is not p.empty:
            defaults[f"_default_{p.name}"] = p.default
            text += f"=_default_{p.name}"
        written.append(text)
        passed.append(f"{p.name}={p.name}" if p.kind is p.KEYWORD_ONLY else p.name)
        if p.kind is p.POSITIONAL_ONLY and (n + 1 == len(parameters) or parameters[n + 1].kind is not p.kind):
            written.append("/")
    return ", ".join(written), ", ".join(passed), defaults


def _way(followed: Followed) -> _Way:
    code = followed.graph.python_code("self")
    constants: dict[str, Any] = {}

    def constant(value: Any) -> str:
        constants[f"_{len(constants)}"] = value
        return f"@_{len(constants) - 1}"

    terms = [
        *_of_arguments(followed.given, constant),
        *(_of_read(read, constant) for read in sorted(followed.reads, key=lambda read: read[:2] != ("", "training"))),
        *(f"type({_path(name)}) is {constant(nn.Identity)}" for name in dict.fromkeys(followed.identities)),
    ]
    constants["@traced"] = tuple(followed.given.traced)
    return _Way(code.src.lstrip(), dict(code.globals), " and ".join(terms) or "True", constants)


def _of_arguments(given: Given, constant: Any) -> list[str]:
    terms = []
    for name, kind in given.traced.items():
        terms.append(f"isinstance({name}, {'_Tensor' if issubclass(kind, Tensor) else constant(kind)})")
    for name, value in given.fixed.items():
        terms.append(_same(name, value, constant))
    return terms


def _of_read(read: Read, constant: Any) -> str:
    if isinstance(read.value, InModule):
        return _same(f"{constant(sys.modules[read.owner])}.{read.name}", read.value.value, constant)
    path = _path(read.owner)
    if read.name == "_modules":
        return f"len({path}._modules) == {read.value}"
    if isinstance(read.value, Present):
        return f"{path}.{read.value.slot}.get({read.name!r}) is not None"
    if isinstance(read.value, OfClass):
        return f"isinstance({path}._modules[{read.name!r}], {constant(read.value.cls)})"
    if read.value is MISSING:
        return f"not hasattr({path}, {read.name!r})"
    return _same(f"{path}.{read.name}", read.value, constant)


_EQUAL = (int, str, float, tuple, list, dict, set, frozenset, deque, torch.dtype, torch.device)


def _same(text: str, value: Any, constant: Any) -> str:
    if value is None or isinstance(value, bool):
        return f"{text} is {value}"
    if type(value) in (int, str):
        return f"{text} == {value!r}"
    if isinstance(value, _EQUAL) and not isinstance(value, Enum):
        return f"{text} == {constant(value)}"
    return f"{text} is {constant(value)}"


def _path(name: str) -> str:
    text = "self"
    for part in filter(None, name.split(".")):
        text = f"{text}.{part}" if part.isidentifier() and not keyword.iskeyword(part) else f"{text}._modules[{part!r}]"
    return text


def _key(recipe: Recipe) -> Any:
    """What two recipes that make the same class have in common; the objects that they name live as long as they do."""
    return (
        recipe.base,
        recipe.signature,
        tuple((name, _stable(value)) for name, value in recipe.constants.items()),
        tuple((way.code, way.condition, _items(way.names), _items(way.constants)) for way in recipe.ways),
    )


def _items(values: dict[str, Any]) -> tuple[Any, ...]:
    return tuple((name, _stable(value)) for name, value in values.items())


def _stable(value: Any) -> Any:
    plain = value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device))
    return (type(value), repr(value)) if plain else (type(value), id(value) if callable(value) else repr(value))


def _portable(recipe: Recipe) -> Recipe:
    """The recipe with modules by their names, which pickle cannot keep."""
    ways = tuple(
        way._replace(names=_each(_packed, way.names), constants=_each(_packed, way.constants)) for way in recipe.ways
    )
    return recipe._replace(ways=ways)


def _each(function: Callable[[Any], Any], values: dict[str, Any]) -> dict[str, Any]:
    return {name: function(value) for name, value in values.items()}


class _Named(NamedTuple):
    module: str


def _packed(value: Any) -> Any:
    return _Named(value.__name__) if isinstance(value, ModuleType) else value


def _unpacked(value: Any) -> Any:
    return importlib.import_module(value.module) if isinstance(value, _Named) else value


def _blank(recipe: Recipe) -> nn.Module:
    """An empty module of the fused class, for pickle and copy to fill."""
    ways = tuple(
        way._replace(names=_each(_unpacked, way.names), constants=_each(_unpacked, way.constants))
        for way in recipe.ways
    )
    # The defaults are those of the class as it is here: a copy of a marker such as object() would be another one.
    cls = _class(recipe._replace(constants=_signature(recipe.base)[2], ways=ways))
    return cls.__new__(cls)
