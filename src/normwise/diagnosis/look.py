"""What one look at a training step shows, and how it is written to what takes scalars."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from normwise.diagnosis.records import Finding, Layer
from normwise.words import counted


@dataclass(frozen=True, repr=False)
class Look:
    """One look of `normwise.Monitor`.

    Attributes:
        step: optimizer steps before this one: 0 is the first.
        layers: what was seen of each layer that was called, in the order of the first calls.
        findings: those that no earlier look has had.
        model: class of the model, which stands for the name of a layer that is the whole model.
        gains: gains and biases of the norms by tag, `normwise/LAYER/gain` and `.../bias`; on the CPU, in float32.
    """

    step: int
    layers: list[Layer]
    findings: list[Finding]
    model: str
    gains: dict[str, Tensor]

    @property
    def scalars(self) -> dict[str, float]:
        """By tag, `normwise/LAYER/...`: see `normwise.Monitor`."""
        return {
            f"normwise/{layer.name or self.model}/{what}": value
            for layer in self.layers
            for what, value in numbers(layer)
        }

    def __repr__(self) -> str:
        codes = [finding.code for finding in self.findings]
        return f"<Look at step {self.step} of {self.model}: {counted(len(self.layers), 'layer')}, new findings {codes}>"


class Logger(Protocol):
    """Takes looks; those of `normwise.integrations` are such."""

    def log(self, look: Look) -> None:
        """Write it."""


def said(finding: Finding) -> str:
    """A finding in one line: code, place, cause and cure."""
    where = f" at {finding.layer!r}" if finding.layer else ""
    return f"{finding.code} ({finding.severity}){where}: {finding.cause} Cure: {finding.cure}"


def write(look: Look, writer: Any) -> None:
    """To whatever has `add_scalar(tag, value, step)`; histograms and findings where it has `add_histogram(tag, values,
    step)` and `add_text(tag, text, step)`, as a SummaryWriter."""
    for tag, value in look.scalars.items():
        writer.add_scalar(tag, value, look.step)
    if callable(getattr(writer, "add_histogram", None)):
        for tag, values in look.gains.items():
            writer.add_histogram(tag, values, look.step)
    if callable(getattr(writer, "add_text", None)):
        for finding in look.findings:
            writer.add_text(f"normwise/findings/{finding.code}", said(finding), look.step)


def numbers(layer: Layer) -> Iterator[tuple[str, float]]:
    """(name, value) of what a layer's record holds."""
    if layer.output is not None and layer.output.all.count:
        everything = layer.output.all
        yield from (("mean", everything.mean), ("std", everything.std))
        yield from ((f"p{p}", everything.percentile(p)) for p in (15, 50, 85))
    if layer.gradient is not None:
        if layer.gradient.output is not None:
            yield "gradient", layer.gradient.output
        yield from ((f"gradient/{name}", value) for name, value in layer.gradient.weights.items())
    if layer.units is not None:
        yield from (("saturated", layer.units.saturated), ("dead", layer.units.dead))
    if layer.norm is not None and layer.norm.running is not None and layer.norm.running.distance.count:
        yield "running/distance", layer.norm.running.distance.percentile(50)
        yield "running/log_ratio", layer.norm.running.log_ratio.percentile(50)
    for inside in layer.recurrence:
        yield from ((f"{inside.place}/saturated/{gate.name}", gate.saturated) for gate in inside.gates)
        if inside.summed:
            yield f"{inside.place}/summed/first", inside.summed[0]
            yield f"{inside.place}/summed/last", inside.summed[-1]
