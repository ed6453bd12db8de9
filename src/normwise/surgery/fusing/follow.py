"""The forward of one module, followed by torch.fx with the modules inside as single steps, and all that it went by.

torch.fx bakes into its graph whatever is no tensor: the mode, numbers, flags, which branch was taken. So a graph is
taken together with conditions that say for which calls it holds, and where a forward goes by what no condition can say
(random numbers, a configuration object, whether gradients are computed), it is not followed.
"""

from __future__ import annotations

import gc
import inspect
import operator
import random
import sys
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import CodeType, FrameType
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, fx, nn

from normwise.ops._torch_internals import any_autocast_enabled
from normwise.surgery.fusing import calls
from normwise.surgery.fusing.globals import MUTABLE, can_be_compared, code_noted, globals_read
from normwise.surgery.report import Refusal
from normwise.surgery.select import class_of

# What every module keeps, and what containers are made of.
_BOOKKEEPING = {*vars(nn.Module()), "__dict__", "__class__"} - {"training"}
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential, nn.ParameterList, nn.ParameterDict)
# Asked by a forward, they say what a graph does not: it would hold for the answer of now.
_QUESTIONS = ("is_grad_enabled", "is_autocast_enabled", "is_inference_mode_enabled")
# A forward with one of these may go by the class of a part.
_ASKS_FOR_CLASSES = {"isinstance", "type", "issubclass", "__class__"}
# Code that changes what is computed inside it without a trace in the graph.
_WRAPPERS = ("torch.utils.checkpoint",)


class Given(NamedTuple):
    """What a forward is called with: by the name of each argument its class (of what is traced) or its value."""

    traced: Mapping[str, type]
    fixed: Mapping[str, Any]


class Read(NamedTuple):
    """An attribute that the forward went by: of which module inside (its name, "" for the module itself), and its
    value then (`InModule` of a global name); of a container's `_modules` the number of them. Of a part or tensor it is
    `Present`, and `OfClass` where the forward may ask for its class; of what there was not, `MISSING`."""

    owner: str
    name: str
    value: Any


class Present(NamedTuple):
    """Not None, in the module's dictionary of that name."""

    slot: str


class InModule(NamedTuple):
    """The value of a global name, of the Python module that is the owner of the `Read`."""

    value: Any


class OfClass(NamedTuple):
    """A part of this class, or of one derived from it."""

    cls: type


MISSING = object()


class Followed(NamedTuple):
    """The graph of a forward, and what it holds for; identities: names of modules inside that must do nothing."""

    graph: fx.Graph
    given: Given
    reads: list[Read]
    identities: tuple[str, ...] = ()


def plainly_given(module: nn.Module) -> Given:
    """A call with tensors for what must be given, and the defaults for all else.

    Raises:
        Refusal: there is none.
    """
    traced: dict[str, type] = {}
    fixed: dict[str, Any] = {}
    for p in inspect.signature(module.forward).parameters.values():
        if p.default is not p.empty:
            fixed[p.name] = p.default
        elif p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            fixed[p.name] = () if p.kind is p.VAR_POSITIONAL else {}
        else:
            traced[p.name] = Tensor
    return Given(traced, fixed)


def follow(module: nn.Module, given: Given, *, training: bool) -> Followed:
    """The forward of `module` in a mode, for calls of one kind.

    Raises:
        Refusal: torch.fx cannot follow it, or what it found would not hold for other calls of this kind.
    """
    before = {id(part): (part, dict(vars(part))) for part in module.modules()}
    contents = [
        (value, value.copy())
        for _, attributes in before.values()
        for name, value in attributes.items()
        if name not in _BOOKKEEPING and type(value) in MUTABLE
    ]
    drawn = _random_state()
    tracer = _Tracer(module, given)
    reads: dict[tuple[int, str], Read] = {}
    ran: dict[CodeType, dict[str, Any]] = {}
    try:
        for part, _ in before.values():
            part.__dict__["training"] = training
        probe = _probe(module, given)
        before[id(probe)] = probe, dict(vars(probe))
        with ExitStack() as stack:
            stack.enter_context(_questions_refused())
            stack.enter_context(_reads_noted(module, probe, tracer, reads))
            stack.enter_context(code_noted(ran, lambda frame: not tracer.busy and _is_users(frame)))
            graph = tracer.trace(probe)
    except Refusal:
        raise
    except Exception as error:  # the user's code run on stand-ins for tensors
        raise Refusal(f"torch.fx cannot follow the forward of its {type(module).__name__}: {_first(error)}") from error
    finally:
        changed = _put_back(before, contents, "training")
    if changed:
        raise Refusal(f"the forward of its {type(module).__name__} keeps something in {changed}")
    if _random_state() != drawn:
        raise Refusal(f"the forward of its {type(module).__name__} goes by random numbers")
    if any(node.op == "get_attr" and str(node.target).startswith("_tensor_constant") for node in graph.nodes):
        raise Refusal(f"the forward of its {type(module).__name__} makes tensors that do not come from its input")
    if tracer.escaped():
        raise Refusal(f"the forward of its {type(module).__name__} keeps a result for later")
    try:
        compile(graph.python_code("self").src, "<graph>", "exec")
    except SyntaxError:  # a layer called "from", or a number with a representation of its own (IntEnum)
        raise Refusal(f"torch.fx cannot write down what the forward of its {type(module).__name__} does") from None
    return Followed(
        graph, given, [*reads.values(), *(Read(one.module, one.name, InModule(one.value)) for one in globals_read(ran))]
    )


class _Proxy(fx.Proxy):
    """A stand-in for a tensor that tells `+=` from `+`, and what class it is of where that is known."""

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        frame = sys._getframe(1)
        if _is_users(frame):
            kind = self.tracer.kinds.get(self.node)  # type: ignore[attr-defined]
            if kind is None:
                raise Refusal("its forward asks of what class a result is")
            return kind
        return type(self)

    def __setattr__(self, name: str, value: Any) -> None:
        if _is_users(sys._getframe(1)):
            raise Refusal(f"its forward sets {name} of a tensor")
        super().__setattr__(name, value)

    def __iadd__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", calls.iadd, (self, other), {})

    def __isub__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", calls.isub, (self, other), {})

    def __imul__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", calls.imul, (self, other), {})

    def __itruediv__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", calls.itruediv, (self, other), {})

    def _refuse(self, other: Any) -> Any:
        raise Refusal("its forward changes a tensor in place by an operator that torch.fx does not know")

    __iand__ = __ior__ = __ixor__ = __ipow__ = __imod__ = __ifloordiv__ = __imatmul__ = _refuse
    __ilshift__ = __irshift__ = _refuse


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(self, module: nn.Module, given: Given) -> None:
        super().__init__()
        self.given, self.module = given, module
        self.kinds: dict[fx.Node, type] = {}
        self.busy = 0
        self._made: list[weakref.ref[fx.Proxy]] = []
        self._mode = _mode()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        self.busy += 1
        try:
            return super().call_module(m, forward, args, kwargs)
        finally:
            self.busy -= 1

    def create_node(self, kind: str, target: Any, args: Any, kwargs: Any, *others: Any, **more: Any) -> fx.Node:
        self.busy += 1
        try:
            if _mode() != self._mode:
                raise Refusal("its forward computes a part without gradients or under autocast, as no graph says")
            if _inside_wrapper(sys._getframe(1)):
                raise Refusal("its forward computes a part inside a checkpoint")
            node = super().create_node(kind, target, args, kwargs, *others, **more)
        finally:
            self.busy -= 1
        if kind == "placeholder" and target in self.given.traced:
            self.kinds[node] = self.given.traced[target]
        return node

    def proxy(self, node: fx.Node) -> fx.Proxy:
        made = _Proxy(node, self)
        self._made.append(weakref.ref(made))
        return made

    def escaped(self) -> bool:
        """Whether somebody still holds a stand-in."""
        self.kinds.clear()
        if all(ref() is None for ref in self._made):
            return False
        gc.collect()
        return any(ref() is not None for ref in self._made)


def _probe(module: nn.Module, given: Given) -> nn.Module:
    """A stand-in for the module with its attributes, whose forward takes what is traced and nothing else."""
    names = list(given.traced)
    parameters = inspect.signature(module.forward).parameters
    positional = [n for n, p in parameters.items() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    passed = ", ".join(
        (name if name in given.traced else f"_fixed[{name!r}]") if name in positional else f"{name}={name}"
        for name in parameters
        if (name in positional or name in given.traced)
    )
    starred = {n for n, p in parameters.items() if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}  # of which none came
    keywords = {name: value for name, value in given.fixed.items() if name not in {*positional, *starred}}
    source = f"def forward(self, {', '.join(names)}):\n    return _forward(self, {passed}, **_keywords)\n"
    scope = {"_forward": type(module).forward, "_fixed": given.fixed, "_keywords": keywords, "__name__": __name__}
    exec(source, scope)
    probe: nn.Module = object.__new__(type(type(module).__name__, (type(module),), {"forward": scope["forward"]}))
    probe.__dict__.update(vars(module))
    return probe


@contextmanager
def _reads_noted(
    module: nn.Module, probe: nn.Module, tracer: _Tracer, reads: dict[tuple[int, str], Read]
) -> Iterator[None]:
    """Notes what is read of the modules inside, other than parts and tensors, while code of theirs runs."""
    names: dict[int, str] = {id(part): name for name, part in module.named_modules()} | {id(probe): ""}
    plain = object.__getattribute__

    def owner_of(part: nn.Module) -> str:
        if id(part) not in names:
            raise Refusal("its forward asks a module that is no part of it")
        return names[id(part)]

    def note(part: nn.Module, name: str, value: Any) -> None:
        owner = owner_of(part)
        if not can_be_compared(value):
            raise Refusal(
                f"its forward goes by {name}, a {type(value).__name__}, of which nobody can tell when it changes"
            )
        reads.setdefault((id(part), name), Read(owner, name, value.copy() if type(value) in MUTABLE else value))

    def looked_up(part: nn.Module, name: str, frame: FrameType) -> None:
        """Of what torch keeps in dictionaries, or nobody does."""
        slots = {slot: plain(part, "__dict__").get(slot, {}) for slot in ("_modules", "_parameters", "_buffers")}
        found = next((slot for slot, content in slots.items() if name in content), None)
        if found is not None and slots[found][name] is None:
            note(part, name, None)
        elif not _is_users(frame):
            return
        elif found is None:
            if any("__getattr__" in vars(cls) for cls in type(part).__mro__[: type(part).__mro__.index(nn.Module)]):
                raise Refusal(f"its forward asks for {name}, which a __getattr__ of its class may give")
            reads.setdefault((id(part), name), Read(owner_of(part), name, MISSING))
        else:
            owner = owner_of(part)
            reads.setdefault((id(part), name), Read(owner, name, Present(found)))
            if found == "_modules" and _ASKS_FOR_CLASSES & {*frame.f_code.co_names}:
                cls = class_of(slots[found][name])
                reads.setdefault((id(part), f"{name}.__class__"), Read(owner, name, OfClass(cls)))

    def noticed(part: nn.Module, name: str) -> Any:
        try:
            value = plain(part, name)
        except AttributeError:
            if not tracer.busy:
                looked_up(part, name, sys._getframe(1))
            raise
        if tracer.busy:
            return value
        if name == "_modules" and isinstance(part, _CONTAINERS) and id(part) in names:
            if sys._getframe(1).f_globals.get("__name__") != "torch.nn.modules.container":
                return value  # torch.fx, which looks at all there is
            reads.setdefault((id(part), name), Read(names[id(part)], name, len(value)))
        elif (
            name not in _BOOKKEEPING
            and not isinstance(value, (Tensor, nn.Module))
            and not inspect.ismethod(value)
            and _is_users(sys._getframe(1))
            and (name in plain(part, "__dict__") or not _is_code(type(part), name))
        ):
            note(part, name, value)
        return value

    with mock.patch.object(nn.Module, "__getattribute__", noticed):
        yield


def _is_code(cls: type, name: str) -> bool:
    """Whether the class has a method or property of that name, which reads what it needs by itself."""
    for base in cls.__mro__:
        if name in vars(base):
            return callable(vars(base)[name]) or hasattr(vars(base)[name], "__get__")
    return True


def _is_users(frame: FrameType) -> bool:
    """Whether a frame runs the forward of a layer, and not the machinery of torch or ours."""
    name = str(frame.f_globals.get("__name__", ""))
    if name.startswith("torch.nn.modules."):
        return name != "torch.nn.modules.module"
    return name.partition(".")[0] not in ("torch", "normwise", "unittest", "inspect")


def _inside_wrapper(frame: FrameType | None) -> bool:
    while frame is not None:
        if str(frame.f_globals.get("__name__", "")).startswith(_WRAPPERS):
            return True
        if frame.f_code is follow.__code__:
            return False
        frame = frame.f_back
    return False


def _mode() -> tuple[bool, ...]:
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), any_autocast_enabled()


@contextmanager
def _questions_refused() -> Iterator[None]:
    """While open, a forward that asks what no graph says is not followed."""

    def refusing(question: str) -> Callable[..., Any]:
        answer = getattr(torch, question)

        def asked(*args: Any, **kwargs: Any) -> Any:
            if _is_users(sys._getframe(1)):
                raise Refusal(f"its forward asks torch.{question}")
            return answer(*args, **kwargs)

        return asked

    def applied(*args: Any, **kwargs: Any) -> Any:
        raise Refusal("its forward calls a function with a gradient of its own (torch.autograd.Function)")

    with ExitStack() as stack:
        for question in _QUESTIONS:
            stack.enter_context(mock.patch.object(torch, question, refusing(question)))
        stack.enter_context(mock.patch.object(torch.autograd.Function, "apply", applied))
        yield


def _random_state() -> tuple[Any, ...]:
    numpy = sys.modules.get("numpy")
    drawn = () if numpy is None else tuple(map(str, numpy.random.get_state()[1:3]))
    return torch.get_rng_state().tolist(), random.getstate(), drawn


def _put_back(before: dict[int, tuple[nn.Module, dict[str, Any]]], contents: list[Any], but: str) -> str:
    """Attributes and their contents as they were; returns the name of one that was changed, "" if none was."""
    found = ""
    for part, attributes in before.values():
        now = vars(part)
        for name in {*now, *attributes} - {but}:
            if name not in now or name not in attributes or now[name] is not attributes[name]:
                found = name
                if name in attributes:
                    now[name] = attributes[name]
                else:
                    del now[name]
        if but in attributes:
            now[but] = attributes[but]
    for value, content in contents:
        if len(value) != len(content) or any(map(operator.is_not, value, content)):
            found = found or "a list"
            value.clear()
            value.extend(content) if isinstance(value, (list, deque)) else value.update(content)
    return found


def _first(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
