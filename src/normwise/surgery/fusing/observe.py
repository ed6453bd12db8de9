"""Activations behind norms, seen in calls on an example, where a forward cannot be followed."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from normwise.measure.snapshot import dry_run
from normwise.surgery.batches import call_example, without_graph
from normwise.surgery.fusing.activations import named
from normwise.surgery.fusing.proof import tensors

# What may be asked of a result without using its values.
_ASKED = {"size", "dim", "numel", "stride", "is_contiguous", "is_floating_point", "__len__", "ndimension", "nelement"}


class InNorm(nn.Module):
    """In the place of an activation that the norms before it compute: what comes in goes out."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        vars(self)["activation"] = activation  # no part of the model as long as it is not called

    def forward(self, input: Tensor) -> Tensor:
        """The input."""
        return input

    def extra_repr(self) -> str:
        return f"{vars(self)['activation']!r}"


class _Result:
    """What a norm returned once, and what took it."""

    def __init__(self, norm: nn.Module, output: Tensor) -> None:
        self.norm, self.output = norm, weakref.ref(output)
        self.users: list[nn.Module | str] = []
        self.over = False


class _Watch(TorchFunctionMode):
    """Notes what takes the results of some norms."""

    def __init__(self) -> None:
        super().__init__()
        self.results: list[_Result] = []
        self.calls: list[tuple[nn.Module, _Result | None]] = []
        self._inside: list[nn.Module] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if not self._inside:
            name = getattr(func, "__name__", str(func))
            harmless = name in _ASKED or (name == "__get__" and not isinstance(output, Tensor))
            for found in () if harmless else self._given(args, kwargs):
                found.users.append(name)
        return output

    def _given(self, args: Any, kwargs: Any) -> list[_Result]:
        given = {id(t) for t in tensors([args, kwargs or {}])}
        return [one for one in self.results if not one.over and id(one.output()) in given]

    def normalized(self, norm: nn.Module, args: Any, output: Any) -> None:
        """Hook behind a norm."""
        if isinstance(output, Tensor):
            self.results.append(_Result(norm, output))

    def entered(self, act: nn.Module, args: Any) -> None:
        """Hook before an activation."""
        found = next(iter(self._given(args, {})), None)
        self.calls.append((act, found))
        if found is not None:
            found.users.append(act)
        self._inside.append(act)

    def left(self, act: nn.Module, args: Any, output: Any) -> None:
        """Hook behind an activation."""
        self._inside.pop()
        _, found = next(one for one in reversed(self.calls) if one[0] is act)
        if found is not None and found.output() is output:
            found.over = True  # in place: from here on it is the activation's result that goes on


def activations_behind(
    model: nn.Module, norms: Iterable[nn.Module], example: Any
) -> tuple[dict[int, nn.Module], dict[int, str]]:
    """By the id of each norm the module whose every call takes a result of such norms, and nothing else does; and of
    the other norms why there is none."""
    acts = [module for module in model.modules() if named(module) is not None]
    results: list[_Result] = []
    calls: list[tuple[nn.Module, _Result | None]] = []
    for training in (False, True):
        watch = _Watch()
        with ExitStack() as hooks, dry_run(model, training=training), without_graph(model):
            for norm in norms:
                hooks.callback(norm.register_forward_hook(watch.normalized).remove)
            for act in acts:
                hooks.callback(act.register_forward_pre_hook(watch.entered).remove)
                hooks.callback(act.register_forward_hook(watch.left).remove)
            try:
                with watch:
                    output = call_example(model, example)
            except Exception:
                if not training:
                    raise
                continue  # a batch of one sample, say
            for one in watch.results:
                if not one.over and one.output() is not None and one.users:
                    one.users.append("something that keeps it, or returns it")
            del output
        results += watch.results
        calls += watch.calls
    return _chosen(norms, results, calls)


def _chosen(
    norms: Iterable[nn.Module], results: list[_Result], calls: list[tuple[nn.Module, _Result | None]]
) -> tuple[dict[int, nn.Module], dict[int, str]]:
    found: dict[int, nn.Module] = {}
    why: dict[int, str] = {}
    for norm in norms:
        mine = [one for one in results if one.norm is norm]
        users = {user if isinstance(user, str) else id(user): user for one in mine for user in one.users}
        if not mine:
            why[id(norm)] = "the example does not call it"
        elif any(len(one.users) != 1 for one in mine) or len(users) != 1 or any(isinstance(u, str) for u in users):
            into = sorted({user if isinstance(user, str) else type(user).__name__ for user in users.values()})
            why[id(norm)] = f"its result goes into {', '.join(into) or 'nothing'}"
        else:
            (found[id(norm)],) = users.values()  # type: ignore[assignment]
    while True:
        elsewhere = {id(act) for act, one in calls if one is None or id(one.norm) not in found}
        lost = [key for key, act in found.items() if id(act) in elsewhere]
        if not lost:
            return found, why
        for key in lost:
            why[key] = f"the {type(found.pop(key)).__name__} behind it is used elsewhere too"


def swap(model: nn.Module, pairs: Mapping[int, nn.Module], successors: Mapping[int, nn.Module]) -> None:
    """Give the norms in the places of the observed ones their activations, and let those pass what comes in."""
    for key, act in pairs.items():
        norm: Any = successors[key]
        norm.act = named(act)
        vars(norm)["_act_of"] = True
    passing = {id(act): InNorm(act).train(act.training) for act in pairs.values()}
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and id(child) in passing:
                parent._modules[name] = passing[id(child)]


def unswap(model: nn.Module) -> None:
    """Put activations back behind the norms that computed them."""
    module: Any
    for module in list(model.modules()):
        if "_act_of" in vars(module):
            del vars(module)["_act_of"]
            module.act = None
        for name, child in module._modules.items():
            if isinstance(child, InNorm):
                module._modules[name] = vars(child)["activation"].train(child.training)
