"""Which modules call norms in their forward, with what, and what of it can be one call."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.utils import parametrize

from normwise.measure.snapshot import dry_run
from normwise.surgery.batches import call_example, without_graph
from normwise.surgery.forwards import BOUND, is_bound
from normwise.surgery.fusing.follow import Followed, Given, follow, plainly_given
from normwise.surgery.fusing.globals import can_be_compared
from normwise.surgery.fusing.owners import is_fused
from normwise.surgery.fusing.pairs import Graph, Pair
from normwise.surgery.report import Refusal

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
# Kinds of calls of one module that its forward is made ready for.
_MOST_KINDS = 3


class Plan(NamedTuple):
    """What is to be done with one module: the graphs of its new forward, what they fuse, and why not the rest, by the
    id of the norm."""

    owner: nn.Module
    ways: list[Followed]
    pairs: list[Pair]
    refused: dict[int, str]


def owners(model: nn.Module, norms: Mapping[int, bool]) -> list[tuple[str, nn.Module, list[int]]]:
    """The modules with norms right inside, each once: their names, and the ids of these norms."""
    found = []
    for name, module in model.named_modules():
        if id(module) in norms or isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            continue
        near = list(_near(module, norms))
        if near:
            found.append((name, module, near))
    return found


def _near(module: nn.Module, norms: Mapping[int, bool]) -> Any:
    for child in module.children():
        if id(child) in norms:
            yield id(child)
        elif isinstance(child, _CONTAINERS):
            yield from _near(child, norms)


def calls_met(model: nn.Module, modules: Sequence[nn.Module], example: Any) -> dict[int, list[Given]]:
    """What each module is called with when the model runs on the example, by its id."""
    met: dict[int, list[Given]] = {}

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found = met.setdefault(id(module), [])
        given = _given(module, args, kwargs)
        if given is not None and given not in found and len(found) < _MOST_KINDS:
            found.append(given)

    with ExitStack() as hooks, dry_run(model, training=False), without_graph(model):
        for module in modules:
            hooks.callback(module.register_forward_pre_hook(look, with_kwargs=True).remove)
        call_example(model, example)
    return met


def _given(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Given | None:
    bound = inspect.signature(module.forward).bind(*args, **kwargs)
    bound.apply_defaults()
    parameters = bound.signature.parameters
    traced: dict[str, type] = {}
    fixed: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        p = parameters[name]
        if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            if value:
                return None
            fixed[name] = value
        elif isinstance(value, Tensor):
            traced[name] = Tensor
        elif can_be_compared(value) or value is p.default:
            fixed[name] = value
        else:
            traced[name] = type(value)
    return Given(traced, fixed)


def plan(module: nn.Module, norms: Mapping[int, bool], met: Sequence[Given]) -> Plan | Refusal:
    """What can be fused in one module's forward, or why that cannot be followed."""
    try:
        return _plan(module, norms, met)
    except Refusal as why:
        return why


def _plan(module: nn.Module, norms: Mapping[int, bool], met: Sequence[Given]) -> Plan:
    if is_bound(module):
        raise Refusal(f"in {type(module).__name__}, {BOUND}")
    if is_fused(module):
        raise Refusal(f"the forward of its {type(module).__name__} is fused already")
    if parametrize.is_parametrized(module):
        raise Refusal(f"its {type(module).__name__} is parametrized")
    ways: list[Followed] = []
    pairs: dict[tuple[int, str], Pair] = {}
    refused: dict[int, str] = {}
    failed: Refusal | None = None
    for given in met or [plainly_given(module)]:
        for training in (False, True):
            followed = _followed(module, given, training)
            if isinstance(followed, Refusal):
                failed = followed
                continue
            graph = Graph(followed.graph, module, norms)
            refused.update(graph.refused)
            if graph.pairs:
                identities = tuple(name for pair in graph.pairs for name in pair.identities)
                ways.append(followed._replace(identities=identities))
                pairs.update({(id(pair.norm), pair.what): pair for pair in graph.pairs})
    if not ways and failed is not None:
        raise failed
    return Plan(module, ways, list(pairs.values()), refused)


def _followed(module: nn.Module, given: Given, training: bool) -> Followed | Refusal:
    try:
        return follow(module, given, training=training)
    except Refusal as why:
        return why
