"""Norms, and what stands right behind or before them, in the graph of a forward; and one call in their places."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.nn import functional as F

from normwise.surgery.fusing import calls
from normwise.surgery.fusing.activations import SUMS, is_activation, is_hooked, named, named_call
from normwise.surgery.graph import LINEAR
from normwise.surgery.report import Refusal
from normwise.surgery.select import NORMS, class_of, kind_of

_BY_FEATURES = (nn.LayerNorm, nn.RMSNorm)
# Functions of torch with an argument `inplace` are known by it, methods and functions by the underscore.
_IN_PLACE = (*calls.IN_PLACE, operator.setitem)


class Pair(NamedTuple):
    """What one call computes: `what` names it for a report, `identities` are modules that were passed over."""

    norm: nn.Module
    what: str
    identities: tuple[str, ...]


class Graph:
    """A graph of a forward, in which pairs are found and made one call.

    Args:
        graph: it is changed.
        owner: the module whose forward it is.
        norms: those that may be fused, by id: whether they are by features (LayerNorm, RMSNorm).
    """

    def __init__(self, graph: fx.Graph, owner: nn.Module, norms: Mapping[int, bool]) -> None:
        self.graph, self.owner, self.norms = graph, owner, norms
        self.pairs: list[Pair] = []
        self.refused: dict[int, str] = {}
        for node in list(graph.nodes):
            norm = self.module(node)
            if norm is None or id(norm) not in norms:
                continue
            try:
                self.pairs.append(self._fused(node, norm))
            except Refusal as why:
                self.refused.setdefault(id(norm), str(why))

    def module(self, node: Any) -> nn.Module | None:
        """The module that a node calls, if it calls one."""
        called = isinstance(node, fx.Node) and node.op == "call_module"
        return self.owner.get_submodule(str(node.target)) if called else None

    def _fused(self, node: fx.Node, norm: nn.Module) -> Pair:
        """Make the call of a norm and what is beside it one call. Raises `Refusal` where nothing can be."""
        if len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], fx.Node):
            raise Refusal("it is called with more than its input")
        by_features = self.norms[id(norm)]
        path, act, residual, identities, why = self._behind(node, by_features)
        before = self._sum_before(node, norm) if by_features else None
        if act is None and residual is None and not isinstance(before, fx.Node):
            raise Refusal(f"{before}; {why}" if before else why)
        if isinstance(before, fx.Node):
            self._after_sum(before, path, act)
        else:
            self._behind_norm(node, path, act, residual)
        parts = [
            "add" if isinstance(before, fx.Node) else "",
            kind_of(norm),
            "add" if residual is not None else "",
            "" if act is None else self._called(act),
        ]
        return Pair(norm, " + ".join(filter(None, parts)), tuple(identities))

    def _behind(
        self, node: fx.Node, by_features: bool
    ) -> tuple[list[fx.Node], fx.Node | None, fx.Node | None, list[str], str]:
        """The nodes from the norm to the last that one call computes, its activation and residual, the identities on
        the way, and why there is no more."""
        path, identities = [node], []
        residual: fx.Node | None = None
        at, kept, skipped, why = node, 1, 0, ""
        while True:
            users = list(at.users)
            if len(users) != 1:
                where = " and ".join(self._called(user) for user in users[:3]) or "nothing"
                why = f"its result goes into {where}" if not users or at is node else f"the result goes into {where}"
                break
            user = users[0]
            module = self.module(user)
            if module is not None and type(module) is nn.Identity and not is_hooked(module) and len(user.args) == 1:
                path.append(user)
                identities.append(str(user.target))
                at = user
                continue
            found = self._activation(user, at)
            if found == "":
                path.append(user)
                return path, user, residual, identities, ""
            if found is None and residual is None and not by_features and (other := _other_term(user, at)) is not None:
                if _writes(user) and user.args[0] is not at and not _is_fresh(self, other, user):
                    why = "it is added to a tensor in place (+=) that others may hold: write a = a + b"
                    break
                path.append(user)
                residual, at, kept, skipped = other, user, len(path), len(identities)
                continue
            if found is None and by_features and _other_term(user, at) is not None:
                why = "a LayerNorm or RMSNorm adds before it normalizes, and behind it stands a sum"
            else:
                why = found or self._no_more(user)
            break
        return path[:kept], None, residual, identities[:skipped], why

    def _no_more(self, user: fx.Node) -> str:
        if user.op == "output":
            return "its result is what the forward returns"
        return f"behind it comes {self._called(user)}, which is no activation that the kernels have"

    def _activation(self, user: fx.Node, at: fx.Node) -> str | None:
        """Of an activation of `at` that the kernels have "", of another why they have not, None of anything else."""
        module = self.module(user)
        if module is not None:
            if not is_activation(module) or user.args != (at,) or user.kwargs:
                return None
            if is_hooked(module):
                return f"the {kind_of(module)} behind it has hooks, which see what fusing takes away"
            return "" if named(module) else f"the kernels have no {kind_of(module)} with these arguments"
        if user.op not in ("call_function", "call_method") or not user.args or user.args[0] is not at:
            return None
        if any(at in _nodes_in(value) for value in (*user.args[1:], *user.kwargs.values())):
            return None
        return "" if named_call(user.target, user.args, user.kwargs) else None

    def _sum_before(self, node: fx.Node, norm: nn.Module) -> fx.Node | str:
        """The sum that a norm by features takes, or why that cannot be part of it."""
        total = node.args[0]
        assert isinstance(total, fx.Node)
        terms = _terms(total)
        if terms is None:
            return f"before it comes {self._called(total)}, which is no sum"
        if _writes(total) and not _is_fresh(self, terms[0], total):
            return "the sum before it is written into a tensor (+=) that others may hold: write a = a + b"
        if len(total.users) > 1 and any(self._may_write(other) for other in self._between(total, node)):
            return "something between the sum and the norm changes tensors in place"
        return total

    def _after_sum(self, total: fx.Node, path: list[fx.Node], act: fx.Node | None) -> None:
        a, b = _terms(total)  # type: ignore[misc]
        with self.graph.inserting_before(total):
            norm = self.graph.get_attr(str(path[0].target))
            arguments = (norm, a, b) if act is None else (norm, a, b, self._act(act))
            into: dict[str, Any] = {"into": 0} if _writes(total) else {}
            both = self.graph.call_function(calls.add_then_norm, arguments, into)
            y, new = (self.graph.call_function(operator.getitem, (both, n)) for n in (0, 1))
        path[-1].replace_all_uses_with(y)
        self._erase(path)
        total.replace_all_uses_with(new)
        self._erase([total])

    def _behind_norm(self, node: fx.Node, path: list[fx.Node], act: fx.Node | None, residual: fx.Node | None) -> None:
        x, last = node.args[0], path[-1]
        total = next((other for other in path if _terms(other) is not None), None)
        assert isinstance(x, fx.Node)
        between = [other for other in self._between(node, last) if other not in path]
        norm = self.module(node)
        assert norm is not None
        if between and any(map(self._is_statistic_of(norm), self.graph.nodes)):
            raise Refusal("its running statistics are looked at in the same forward")
        if any(norm in self._reached(other) for other in between):
            raise Refusal("it is called once more before what stands behind it")
        if any(map(self._may_write, between)) and not (_is_fresh(self, x, node) and not self._is_summed_early(path)):
            raise Refusal("something between it and what stands behind it may change its input in place")
        with self.graph.inserting_before(last):
            arguments = (self.graph.get_attr(str(node.target)), x, None if act is None else self._act(act))
            if residual is not None:
                arguments = (*arguments, residual)  # type: ignore[assignment]
            into: dict[str, Any] = (
                {"into": int(total.args[0] is residual)} if total is not None and _writes(total) else {}
            )
            y = self.graph.call_function(calls.norm_then, arguments, into)
        last.replace_all_uses_with(y)
        self._erase(path)

    def _is_summed_early(self, path: list[fx.Node]) -> bool:
        """Whether anything that may write in place comes between the sum and the activation, where the residual would
        be read later than it was."""
        sums = [node for node in path if _terms(node) is not None]
        return bool(sums) and any(
            self._may_write(other) for other in self._between(sums[0], path[-1]) if other not in path
        )

    def _act(self, node: fx.Node) -> Any:
        """The activation as the fused call takes it: the module, or the name of the function."""
        if node.op == "call_module":
            return self.graph.get_attr(str(node.target))
        return named_call(node.target, node.args, node.kwargs)

    def _between(self, first: fx.Node, last: fx.Node) -> list[fx.Node]:
        nodes = list(self.graph.nodes)
        return nodes[nodes.index(first) + 1 : nodes.index(last)]

    def _may_write(self, node: fx.Node) -> bool:
        """Whether the node may change one of its arguments in place."""
        module = self.module(node)
        if module is not None:
            return not all(map(_is_known, module.modules())) or any(
                getattr(part, "inplace", False) for part in module.modules()
            )
        if node.op not in ("call_function", "call_method"):
            return False
        if node.target in _IN_PLACE or node.kwargs.get("inplace") or "out" in node.kwargs:
            return True
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        if name.endswith("_") and not name.endswith("__"):
            return True
        # A function of the user's that torch.fx does not look into may do anything; those of torch do what they say.
        home = str(getattr(node.target, "__module__", "") or "torch")
        by_position = any(value is True for value in node.args) and getattr(F, name, None) is node.target
        known = home.partition(".")[0] in ("torch", "_operator", "operator", "builtins", "math", "normwise")
        return by_position or not (known or node.op == "call_method")

    def _reached(self, node: fx.Node) -> list[nn.Module]:
        """The modules that a node may call."""
        if node.op == "get_attr":
            owner, _, name = str(node.target).rpartition(".")
            found = getattr(self.owner.get_submodule(owner), name)
            return [found] if isinstance(found, nn.Module) else []
        module = self.module(node)
        return [] if module is None else list(module.modules())

    def _is_statistic_of(self, norm: nn.Module) -> Callable[[fx.Node], bool]:
        """Whether a node is one of the norm's buffers, which its call changes."""
        buffers = {id(buffer) for buffer in norm.buffers()}

        def is_one(node: fx.Node) -> bool:
            if node.op != "get_attr":
                return False
            owner, _, name = str(node.target).rpartition(".")
            return id(getattr(self.owner.get_submodule(owner), name)) in buffers

        return is_one

    def _erase(self, path: list[fx.Node]) -> None:
        for node in reversed(path):
            self.graph.erase_node(node)

    def _called(self, node: fx.Node) -> str:
        """A node as a report names it."""
        module = self.module(node)
        if module is not None:
            return f"{kind_of(module)} {node.target}"
        if node.op == "output":
            return "what the forward returns"
        if node.op == "placeholder":
            return "the input"
        return str(getattr(node.target, "__name__", node.target))


def _is_known(module: nn.Module) -> bool:
    return class_of(module).__module__.startswith(("torch.nn.", "normwise."))


def _writes(total: fx.Node) -> bool:
    """Whether a sum is written into its first term."""
    return total.target is calls.iadd or total.target == "add_"


def _nodes_in(value: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg(value, found.append)
    return found


def _terms(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two tensors, or what may be some, that a node adds."""
    is_sum = node.op in ("call_function", "call_method") and (node.target in SUMS or node.target is calls.iadd)
    if not is_sum or len(node.args) != 2 or node.kwargs:
        return None
    a, b = node.args
    return (a, b) if isinstance(a, fx.Node) and isinstance(b, fx.Node) else None


def _other_term(node: fx.Node, at: fx.Node) -> fx.Node | None:
    """What a node adds to `at`."""
    terms = _terms(node)
    if terms is None or terms[0] is terms[1]:
        return None
    return terms[1] if terms[0] is at else terms[0]


def _is_fresh(graph: Graph, node: fx.Node, user: fx.Node) -> bool:
    """Whether a result is a tensor of its own that nobody but `user` holds."""
    module = graph.module(node)
    made = isinstance(module, (*LINEAR, *NORMS)) and _is_known(module) and not is_hooked(module)
    made |= node.op == "call_function" and node.target in (operator.add, operator.mul, torch.add, torch.mul, torch.cat)
    return made and list(node.users) == [user]
