"""What a layer's forward is: its class's own, one that a user's class extends, or one bound to the instance."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import fx, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from normwise.surgery.select import BATCH, class_of, known_base

# By these a forward that does not call its base's may compute the same.
_FUNCTIONS = ((BATCH, F.batch_norm), (nn.GroupNorm, F.group_norm), (nn.LayerNorm, F.layer_norm))
# Calls that change nothing but the count of batches. The first is torch's assert that torch.fx can follow.
_HARMLESS = ("_assert", "getattr", "eq", "ne", "in", "dim", "size")

BOUND = (
    "a forward is bound to this very instance (as accelerate's hooks are), and may compute something else: take it "
    "off first (accelerate.hooks.remove_hook_from_submodules), and put it on again afterwards"
)


def is_bound(layer: nn.Module) -> bool:
    """Whether the instance has a forward of its own, beside its class's."""
    return "forward" in vars(layer)


def overrides_forward(layer: nn.Module, base: type[nn.Module]) -> bool:
    """Whether the layer computes, or may compute, something else than `base`, from which its class is derived."""
    return is_bound(layer) or class_of(layer).forward is not base.forward


def own_modules(layer: nn.Module) -> dict[str, nn.Module]:
    """The modules that a user's class adds to a norm or a recurrent layer, which have none."""
    parametrized = parametrize.is_parametrized(layer)
    return {
        name: module for name, module in layer.named_children() if not (parametrized and name == "parametrizations")
    }


def held(model: nn.Module) -> dict[int, str]:
    """By the id of each module that a forward bound to an instance holds by itself: that instance's name."""
    return {
        id(module): name or "the model"
        for name, owner in model.named_modules()
        if is_bound(owner)
        for module in reached(vars(owner)["forward"])
    }


def reached(value: Any) -> Iterator[nn.Module]:
    """The modules that a function can reach: arguments, defaults and closure, and the global names that it reads."""
    seen: set[int] = set()
    left = [value]
    while left:
        value = left.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, nn.Module):
            yield value
        elif isinstance(value, functools.partial):
            left += [value.func, value.args, value.keywords]
        elif isinstance(value, MethodType):
            left += [value.__self__, value.__func__]
        elif isinstance(value, FunctionType):
            left += [_content(cell) for cell in value.__closure__ or ()]
            left += [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
            read = (value.__globals__.get(name) for name in value.__code__.co_names)
            left += [found for found in read if isinstance(found, (nn.Module, MethodType, functools.partial))]
        elif isinstance(value, dict):
            left += value.values()
        elif isinstance(value, (tuple, list)):
            left += value


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def followers(layer: nn.Module) -> list[nn.Module] | None:
    """The modules of its own that a layer's class calls behind what its base computes, one after the other; None where
    its forward does, or may do, anything else.

    What timm's BatchNormAct2d does is `act(drop(batch_norm(x)))`, whether by super().forward or written out.
    """
    in_eval, in_training = _both_ways(_chain, layer)
    if in_eval is None or in_eval != in_training or {*in_eval} != {*own_modules(layer)}:
        return None
    return [layer.get_submodule(name) for name in in_eval]


def normalizes_its_input(layer: nn.Module) -> bool:
    """Whether it is certain that what the layer is called with is what its base normalizes, whatever else it does."""
    return not overrides_forward(layer, known_base(layer)) or all(_both_ways(_base_call, layer))


def _both_ways(look: Callable[[nn.Module, bool], Any], layer: nn.Module) -> list[Any]:
    """What is seen of a layer's forward in eval and in train mode; None where it cannot be followed."""
    if is_bound(layer) or parametrize.is_parametrized(layer):
        return [None, None]
    try:
        return [look(layer, training) for training in (False, True)]
    except Exception:  # torch.fx runs the user's code with stand-ins for tensors, which may fail in any way
        return [None, None]


class _Leaves(fx.Tracer):
    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _base_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Stands in for the base's forward while torch.fx follows a class that is derived from it."""
    return args[0].tracer.create_proxy("call_function", _base_forward, args, kwargs)


def _nodes(layer: nn.Module, training: bool) -> list[fx.Node]:
    """What the forward of the layer's class does in one mode, its base's forward being one node."""
    stand_in = type("StandIn", (known_base(layer),), {"forward": _base_forward})
    probe = copy.copy(layer)  # its modules and tensors are the layer's own, of which nothing is computed here
    probe.__class__ = type("Probe", (class_of(layer), stand_in), {})
    probe.training = training
    parameters = inspect.signature(probe.forward).parameters.values()
    graph = _Leaves().trace(probe, {p.name: p.default for p in parameters if p.default is not p.empty})
    return list(graph.nodes)


def _base_call(layer: nn.Module, training: bool) -> fx.Node | None:
    """The one node that does what the base does of the input."""
    first, *others = _nodes(layer, training)
    found = [node for node in others if node.target is _base_forward or _is_base(layer, node, first, training)]
    return found[0] if len(found) == 1 and _is_base(layer, found[0], first, training) else None


def _chain(layer: nn.Module, training: bool) -> list[str] | None:
    """The names of the modules behind it, in the order of their calls, if there is nothing else."""
    *nodes, output = _nodes(layer, training)
    names: list[str] = []
    node = output.args[0]
    on_the_way = {nodes[0]}
    while isinstance(node, fx.Node) and node.op == "call_module" and len(node.args) == 1 and not node.kwargs:
        names.insert(0, str(node.target))
        on_the_way.add(node)
        node = node.args[0]
    if not isinstance(node, fx.Node) or not _is_base(layer, node, nodes[0], training):
        return None
    on_the_way.add(node)
    return names if all(node in on_the_way or _harmless(node) for node in nodes) else None


def _is_base(layer: nn.Module, node: fx.Node, x: fx.Node, training: bool) -> bool:
    """Whether a node computes what the layer's base does of `x`, by its forward or by the function that it calls."""
    if node.target is _base_forward:
        return node.args == (x,) and all(value is None for value in node.kwargs.values())
    function = next((function for kind, function in _FUNCTIONS if isinstance(layer, kind)), None)
    if node.target is not function or function is None or known_base(layer).__module__.startswith("normwise."):
        return False
    given = inspect.signature(function).bind(*node.args, **node.kwargs)
    given.apply_defaults()
    expected = {"training": training or getattr(layer, "running_mean", None) is None}
    for name, value in given.arguments.items():
        if name == "input":
            fits = value is x
        elif isinstance(value, fx.Node):
            fits = value.op == "get_attr" and value.target == name
        elif name == "momentum" and not training:
            fits = True  # nothing is averaged
        else:
            fits = value == expected.get(name, getattr(layer, name, None))
        if not fits:
            return False
    return True


def _harmless(node: fx.Node) -> bool:
    if node.op == "call_method" and node.target == "add_":
        counter = node.args[0]
        return isinstance(counter, fx.Node) and counter.target == "num_batches_tracked"
    return node.op in ("get_attr", "placeholder") or getattr(node.target, "__name__", node.target) in _HARMLESS
