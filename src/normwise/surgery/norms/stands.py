"""Layers of other classes with what computes the same in their places, for as long as something is done to a model."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from torch import nn

from normwise.surgery.forwards import BOUND, held, is_bound
from normwise.surgery.norms.exchange import exchange
from normwise.surgery.norms.recognize import is_own
from normwise.surgery.report import Refusal
from normwise.surgery.select import Layer


class Stands:
    """On leaving, the layers stand in their places again, but for those that are kept; after an error, all of them."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._held = held(model)
        self._taken: dict[int, tuple[Layer, Layer]] = {}

    def take(self, one: Layer, met: Mapping[int, Any]) -> Refusal | None:
        """Put the norm of normwise that computes what the layer does in its places, its own modules behind it; returns
        why that cannot be done. A layer of torch.nn or normwise stays.

        Args:
            met: what the layers were called with in an example, by id; see `inputs_met`.
        """
        if is_own(one.module) or one.module is self.model:
            return None
        if is_bound(one.module):
            return Refusal(BOUND)
        if id(one.module) in self._held:
            return Refusal(f"the forward that is bound to {self._held[id(one.module)]} holds it by itself")
        try:
            found = exchange(one.module, met[id(one.module)].calls if id(one.module) in met else ())
        except Refusal as why:
            return why
        new, inside = (found.norm, "") if not found.following else (nn.Sequential(found.norm, *found.following), ".0")
        new.training = one.module.training
        for module, name in ((one.module, hook) for hook in ("_forward_hooks", "_forward_pre_hooks")):
            setattr(found.norm, name, getattr(module, name))  # which whoever looks for hooks finds
        self._put(one, new)
        self._taken[id(one)] = one, Layer(found.norm, [name + inside for name in one.names])
        return None

    def of(self, one: Layer) -> Layer:
        """What stands for a layer, or the layer itself."""
        return self._taken[id(one)][1] if id(one) in self._taken else one

    def keep(self, one: Layer) -> None:
        """What stands for this layer now stays."""
        self._taken.pop(id(one), None)

    def _put(self, one: Layer, module: nn.Module) -> None:
        for name in one.names:
            parent, _, key = name.rpartition(".")
            self.model.get_submodule(parent)._modules[key] = module

    def __enter__(self) -> Stands:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for one, _ in self._taken.values():
            self._put(one, one.module)
