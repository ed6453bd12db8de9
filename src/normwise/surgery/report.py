"""What an operation did to a model, layer by layer, and what it left alone and why."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

from torch import nn


class Change(NamedTuple):
    """One layer that was changed.

    name: its place in the model, "" for the model itself; several places of a shared layer are joined by ", ".
    before, after: what stood and stands there, e.g. "BatchNorm2d" and "GroupNorm".
    note: what else to know, e.g. what did not carry over; "" if nothing.
    """

    name: str
    before: str
    after: str
    note: str = ""


class Skip(NamedTuple):
    """One layer that was looked at and left as it is: its place, its class, and why."""

    name: str
    layer: str
    reason: str


@dataclass
class Report:
    """Printed, it reads as a list: what was changed, then what was skipped and why.

    Attributes:
        verb: the operation, e.g. "convert to group".
        changed, skipped: one entry a layer, in the model's order.
    """

    verb: str
    changed: list[Change] = field(default_factory=list)
    skipped: list[Skip] = field(default_factory=list)

    @property
    def reasons(self) -> str:
        """What was skipped and why, as the last lines of an error that says that nothing was changed."""
        return "".join(f"\n  {_place(name)}: {layer}: {reason}" for name, layer, reason in self.skipped)

    def __str__(self) -> str:
        width = max((len(_place(entry[0])) for entry in (*self.changed, *self.skipped)), default=0)
        lines = [f"{self.verb}: {len(self.changed)} changed, {len(self.skipped)} skipped"]
        for name, before, after, note in self.changed:
            lines.append(f"  {_place(name):<{width}}  {before} -> {after}" + (f"  ({note})" if note else ""))
        for name, layer, reason in self.skipped:
            lines.append(f"  {_place(name):<{width}}  {layer} skipped: {reason}")
        return "\n".join(lines)


class Surgery(NamedTuple):
    """What `convert` and `fold` return: `model, report = convert(...)`."""

    model: nn.Module
    report: Report

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises TypeError: this is not the model."""
        raise TypeError(_PAIR)

    def __getattr__(self, name: str) -> NoReturn:
        known = hasattr(self.model, name)
        raise AttributeError(f"'Surgery' object has no attribute {name!r}" + (f": {_PAIR}" if known else ""))


class Refusal(Exception):
    """Why one layer cannot be changed; caught by the operation and entered into its report."""


class AlreadyOne(Refusal):
    """Nothing to do: the layer is already of the target class."""

    def __init__(self) -> None:
        super().__init__("is one already")


_PAIR = (
    "convert and fold return the model and a report: write `model, report = normwise.convert(...)`, or take "
    "`normwise.convert(...).model`"
)


def _place(name: str) -> str:
    return name or "(the model)"
