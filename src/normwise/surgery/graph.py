"""Who calls whom in a model's forward: the graphs that `fold` reads its pairs from."""

from __future__ import annotations

import inspect
from collections import Counter
from typing import Any

from torch import fx, nn
from torch.nn.utils import parametrize

from normwise.surgery.forwards import held, is_bound, overrides_forward, own_modules
from normwise.surgery.report import Refusal
from normwise.surgery.select import NORMS, RECURRENT, kind_of, known_base

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LINEAR = (*CONVS, *TRANSPOSED, nn.Linear)


class Calls:
    """The calls of a model's layers in one way through its forward."""

    def __init__(self, model: nn.Module, arguments: dict[str, Any]) -> None:
        self.model = model
        self.graph = _Tracer().trace(model, arguments)
        uses = Counter(id(p) for module in model.modules() for p in module._parameters.values())
        self._tied = {key for key, count in uses.items() if count > 1}
        self._held = held(model)
        # What a layer of torch.nn that is one node here calls within it.
        called = (self.module(node) for node in self.graph.nodes)
        self._inside = {id(part) for layer in called if layer for part in layer.modules() if part is not layer}

    def module(self, node: Any) -> nn.Module | None:
        """The layer that a node calls, if it calls one."""
        called = isinstance(node, fx.Node) and node.op == "call_module"
        return self.model.get_submodule(str(node.target)) if called else None

    def of(self, module: nn.Module) -> list[fx.Node]:
        """The calls of a layer."""
        return [node for node in self.graph.nodes if self.module(node) is module]

    def call(self, module: nn.Module) -> fx.Node:
        """The one call of a layer that may be rewritten. Raises `Refusal` if something else depends on it."""
        what = kind_of(module)
        nodes = self.of(module)
        if id(module) in self._inside:
            raise Refusal(f"the {what} is called inside another layer of torch.nn, which may use it in its own way")
        if len(nodes) != 1:
            raise Refusal(f"the {what} is called {len(nodes)} times")
        if len(nodes[0].args) != 1 or nodes[0].kwargs:
            raise Refusal(f"the {what} is called with more than its input")
        if module._forward_hooks or module._forward_pre_hooks:
            raise Refusal(f"the {what} has hooks, which see what folding takes away")
        if parametrize.is_parametrized(module):
            raise Refusal(f"the {what} is parametrized: torch.nn.utils.parametrize.remove_parametrizations first")
        if overrides_forward(module, known_base(module)):
            bound = ", bound to this very instance: take it off first" if is_bound(module) else ""
            raise Refusal(f"the {what} has a forward of its own{bound}")
        if id(module) in self._held:
            raise Refusal(f"the forward that is bound to {self._held[id(module)]} holds the {what} by itself")
        if own := own_modules(module):
            raise Refusal(f"the {what} has modules of its own ({', '.join(own)}), which would be lost")
        if any(id(parameter) in self._tied for parameter in module._parameters.values() if parameter is not None):
            raise Refusal(f"the {what} shares a parameter with another layer")
        for node in self.graph.nodes:
            if node.op == "get_attr" and self.model.get_submodule(str(node.target).rpartition(".")[0]) is module:
                raise Refusal(f"the forward reads {node.target} by itself")
        return nodes[0]

    def remove(self, module: nn.Module) -> None:
        """Its one call gives way to the call's input."""
        for node in self.of(module):
            node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
            self.graph.erase_node(node)


def ways_through(model: nn.Module) -> tuple[list[Calls], str]:
    """The model's forward with its optional arguments left out, and with all of them given; and a note if the second
    could not be followed.

    Raises:
        ValueError: the forward cannot be followed.
    """
    if is_bound(model):
        raise ValueError(
            "fold follows the forward of the model's class, but another one is bound to this very instance (as by "
            "accelerate's hooks): take it off first, and put it on again afterwards"
        )
    parameters = inspect.signature(model.forward).parameters.values()
    left_out = {p.name: p.default for p in parameters if p.default is not p.empty}
    try:
        ways = [Calls(model, left_out)]
    except Exception as error:
        raise ValueError(
            f"fold could not follow the model's forward with torch.fx: {error}. It must not depend on the values or "
            "sizes of tensors. Fold the parts that can be followed, e.g. normwise.fold(model.backbone, inplace=True)"
        ) from error
    if not left_out:
        return ways, ""
    try:
        return [*ways, Calls(model, {})], ""
    except Exception:
        return ways, f"for calls that leave {', '.join(left_out)} at the default"


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (*NORMS, *RECURRENT, *LINEAR)) or super().is_leaf_module(m, module_qualified_name)
