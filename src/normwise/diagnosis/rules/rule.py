"""What a rule is: a small pure function over the numbers of a diagnosis, and what to say when it matches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from normwise.diagnosis.records import Diagnosis, Finding, Severity
from normwise.words import counted


class Match(NamedTuple):
    """One place where a rule holds: the layer's name, "" for the whole model, and the numbers that show it."""

    layer: str
    evidence: dict[str, Any]


def some(names: Sequence[str], most: int = 4) -> str:
    """ "a, b, c, d and 7 more"."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


class _Count(int):
    """A count in a text, which may say of what: `{gains:1 gain}`."""

    def __format__(self, form: str) -> str:
        return counted(int(self), form[2:]) if form.startswith("1 ") else format(int(self), form)


@dataclass(frozen=True)
class Rule:
    """A row of the table.

    Attributes:
        code, title, severity: see `records.Finding`.
        matches: the function over the numbers.
        cause, cure: texts with the evidence's names in braces, as in `str.format`; `{layer}` is the layer's name, and
            `{module}` is how a line of code gets at it; `{gains:1 gain}` is "1 gain" or "2 gains". A line of code in a
            cure has its effect when it is run as printed, on `model`, `batches` and `optimizer` as they were given.
        claims: ids of the published claims behind it.
        speaks_against: the norm that it speaks against where it can be foreseen without a measurement, for `recommend`:
            "batch", "none" or None.
        foreseen: whether it will hold in the circumstances that `recommend` was told of.
    """

    code: str
    title: str
    severity: Severity
    matches: Callable[[Diagnosis], Iterable[Match]]
    cause: str
    cure: str
    claims: tuple[str, ...] = ()
    speaks_against: str | None = None
    foreseen: Callable[[Any], str | None] = lambda _: None

    def findings(self, diagnosis: Diagnosis) -> Iterator[Finding]:
        for layer, evidence in self.matches(diagnosis):
            module = f"model.get_submodule({layer!r})" if layer else "model"
            counts = {name: _Count(value) for name, value in evidence.items() if type(value) is int}
            words = {"layer": layer or "the model", "module": module, **evidence, **counts}
            yield Finding(
                self.code,
                self.severity,
                layer,
                self.title,
                evidence,
                self.cause.format(**words),
                self.cure.format(**words),
                list(self.claims),
            )
