"""What a diagnosis consists of: plain numbers, layer by layer, and the findings drawn from them.

    Diagnosis
      .findings, .silenced   list[Finding]      what the rules say of the numbers, most severe first
      .layers                list[Layer]        in the order of their first call; those never called come last
      .groups                list[FindingGroup] the findings again, one entry for each code
      .streams               list[Stream]       what chains of blocks hand on: the residual stream of a transformer
      .attention             list[Attention]    how large attention's logits are, and how many rows have collapsed
      .nonfinite             NonFinite          how much of outputs, losses and gradients is NaN or infinite
      .gap                   Gap | None         how far the outputs of train and eval mode are apart, and whose doing
      .training              Training | None    the steps that were watched, if there was an optimizer
      .optimizer             list[Group]        its parameter groups
      .data                  Data               the batches: sizes, lengths, padding
      .notes                 list[str]          what could not be measured, and why

    Layer
      .input, .output        Activations        distributions over all values, features, samples and time steps
      .units                 Units              saturated and dead units of a nonlinearity
      .gradient              Gradient           of the loss, with respect to its output and its weights
      .norm                  Norm               a norm's settings, gains and biases, running against batch statistics
      .recurrence            list[Recurrence]   gates, summed inputs and gradients over time, one for each direction
      .shift                 Shift              internal covariate shift over the steps that were watched
      .gap                   float              how much of the train/eval gap appears when it alone is in train mode

Every record is a frozen dataclass of numbers, strings, lists and other records; what was not measured is None. All of
it survives `Diagnosis.from_dict(diagnosis.to_dict())` and `from_json(to_json())`, which writes NaN and infinity as
strings, since JSON has neither; plain data and JSON also have `groups`, for programs that read them. `VERSION` goes up
when a field changes its meaning or goes away.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from normwise.diagnosis.layer_records import Gate, Layer, Norm, Recurrence, Role, Running, Shift
from normwise.diagnosis.plain import restored, strict
from normwise.diagnosis.transformer_records import Attention, FirstNonFinite, Size, Stream, StreamPoint
from normwise.diagnosis.values import (
    PERCENTILES,
    Activations,
    Distribution,
    Gradient,
    Histogram,
    OverTime,
    Spread,
    Units,
)
from normwise.words import counted, given

__all__ = [
    "PERCENTILES",
    "SEVERITIES",
    "VERSION",
    "Activations",
    "Attention",
    "Data",
    "Diagnosis",
    "Distribution",
    "Finding",
    "FindingGroup",
    "FirstNonFinite",
    "Gap",
    "Gate",
    "Gradient",
    "Group",
    "Histogram",
    "Layer",
    "NonFinite",
    "Norm",
    "OverTime",
    "Recurrence",
    "Role",
    "Running",
    "Severity",
    "Shift",
    "Size",
    "Spread",
    "Stream",
    "StreamPoint",
    "Training",
    "Units",
]

VERSION = 3

Severity = Literal["error", "warning", "advice"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "advice")


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or could be better.

    Attributes:
        code: "NW001" and so on: stable, what silencing and scripts go by.
        severity: "error" (results are wrong), "warning" (training or evaluation suffers), "advice".
        layer: the dotted name in `model.named_modules()`; "" where it is about the whole model.
        title: what is found, in a few words: the same for every finding of a code.
        evidence: the numbers, by name.
        cause: one or two sentences that say with these numbers why it is so.
        cure: what to do: a call of this library, or a line of code.
        claims: ids of the published claims that stand behind it, as in `normwise claims`.
    """

    code: str
    severity: Severity
    layer: str
    title: str
    evidence: dict[str, Any]
    cause: str
    cure: str
    claims: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class FindingGroup:
    """All findings of one code: one thing that is so in one layer or in many.

    Attributes:
        code, severity, title, claims: as each of them has.
        findings: one for each place, in the order of the layers' calls.
    """

    code: str
    severity: Severity
    title: str
    claims: list[str]
    findings: list[Finding]

    @property
    def layers(self) -> list[str]:
        """The names of the layers, each once; without the model as a whole."""
        return list(dict.fromkeys(finding.layer for finding in self.findings if finding.layer))


@dataclass(frozen=True)
class NonFinite:
    """What is NaN or infinite, over all batches.

    Attributes:
        inputs: values of the batches themselves; `batches` says which, counted from 0.
        parameters: names of the model's parameters that held such a value when it was given, with how many of how many.
            Looked for where outputs, losses or gradients have it.
        outputs, eval_outputs: values of the model's output in train and in eval mode.
        losses: batches on which the loss is.
        gradients: names of the parameters whose gradient has such a value.
        first, first_gradient: where it is first met, on the way forward and on the way back of the first pass whose
            output, loss or gradients have it; None where no layer has.
    """

    inputs: int = 0
    outputs: int = 0
    losses: int = 0
    gradients: list[str] = field(default_factory=list)
    eval_outputs: int = 0
    first: FirstNonFinite | None = None
    first_gradient: FirstNonFinite | None = None
    batches: list[int] = field(default_factory=list)
    parameters: dict[str, list[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Gap:
    """Train mode against eval mode on the same batches.

    Attributes:
        output: root mean square difference of the outputs, in deviations of the eval-mode output.
        train_loss, eval_loss: means over the batches.
        elsewhere: the part that no single layer's mode brings about: code that reads `self.training` outside a layer.
            0 where no code does; None where it could not be measured.
    """

    output: float
    train_loss: float
    eval_loss: float | None
    elsewhere: float | None = None


@dataclass(frozen=True)
class Training:
    """The watched steps: the loss before each, and the norm of the whole gradient."""

    losses: list[float]
    gradients: list[float]


@dataclass(frozen=True)
class Group:
    """A parameter group of the optimizer.

    Attributes:
        weight_decay: its setting.
        gains, biases: how many gains and biases of norm layers are in it, as parameters; without the weights that an
            offset is added to, which a decay pulls to that gain and not to 0.
        examples: names of a few of these.
    """

    optimizer: str
    learning_rate: float
    weight_decay: float
    parameters: int
    gains: int
    biases: int
    examples: list[str]


@dataclass(frozen=True)
class Data:
    """The batches.

    Attributes:
        batches: how many were looked at.
        sizes: samples in each.
        steps: time steps in each, for sequences.
        padding: share of the positions that are padding, over all batches; None where nothing tells.
        told_by: what tells which positions are padding: the name of an input, "trailing zeros", "padding_idx".
    """

    batches: int
    sizes: list[int]
    steps: list[int]
    padding: float | None
    told_by: str | None


@dataclass(frozen=True, repr=False)
class Diagnosis:
    """Everything that `normwise.diagnose` saw. See the module's docstring for the overview.

    Printed it is its table, `normwise.diagnosis.as_text`; a notebook shows its page.

    Attributes:
        model: class of the model.
        wrapper: class of what it was wrapped in, such as "DistributedDataParallel".
        ranks: how many processes train together.
        was_training: the mode in which it was given.
        parameters, trainable: numbers in all.
    """

    model: str
    wrapper: str | None
    ranks: int
    was_training: bool
    parameters: int
    trainable: int
    data: Data
    layers: list[Layer]
    streams: list[Stream] = field(default_factory=list)
    attention: list[Attention] = field(default_factory=list)
    nonfinite: NonFinite = field(default_factory=NonFinite)
    gap: Gap | None = None
    training: Training | None = None
    optimizer: list[Group] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    silenced: list[Finding] = field(default_factory=list)
    version: int = VERSION

    def layer(self, name: str) -> Layer:
        """The layer of that name.

        Raises:
            KeyError: there is none; names those that there are.
        """
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(f"no layer {name!r}: the layers are {', '.join(repr(layer.name) for layer in self.layers)}")

    @property
    def places(self) -> list[str]:
        """The names of all modules that a finding may be about: layers, blocks and what holds them, attention."""
        blocks = [name for stream in self.streams for name in (stream.layer, *stream.blocks)]
        return list(dict.fromkeys([*(x.name for x in self.layers), *blocks, *(a.layer for a in self.attention)]))

    @property
    def groups(self) -> list[FindingGroup]:
        """The findings, one entry for each code."""
        return grouped(self.findings)

    def __str__(self) -> str:
        from normwise.diagnosis.table import as_text  # which is made of these records

        return as_text(self)

    def __repr__(self) -> str:
        counts = {group.code: len(group.findings) for group in self.groups}
        layers = counted(len(self.layers), "layer")
        return f"<Diagnosis of {self.model}: {layers}, findings {counts}; print() shows its table>"

    def _repr_html_(self) -> str:
        from normwise.diagnosis.page import framed

        return framed(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, numbers and strings."""
        groups = [
            {"code": g.code, "severity": g.severity, "title": g.title, "claims": g.claims, "layers": g.layers}
            for g in self.groups
        ]
        return dataclasses.asdict(self) | {"groups": groups}

    def to_json(self, indent: int | None = None) -> str:
        """Strict JSON: NaN and infinities are the strings "NaN", "Infinity", "-Infinity"."""
        return json.dumps(strict(self.to_dict()), indent=indent, allow_nan=False)

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> Diagnosis:
        """The inverse of `to_dict`, and of `to_json` after `json.loads`.

        Raises:
            ValueError: written by another version of this format.
        """
        if plain.get("version") != VERSION:
            raise ValueError(
                f"this diagnosis has format version {plain.get('version')!r}, but this normwise reads {VERSION}: "
                "diagnose the model again"
            )
        return restored(cls, plain)

    @classmethod
    def from_json(cls, text: str) -> Diagnosis:
        """The inverse of `to_json`.

        Raises:
            ValueError: no JSON of a diagnosis, or one of another version. TypeError: no text.
        """
        cure = "give the text that to_json() returned, Path(p).read_text() of a file"
        try:
            plain = json.loads(text)
        except (TypeError, ValueError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"text must be the JSON of a diagnosis, but got {given(text)}: {cure} ({error})") from error
        if not isinstance(plain, dict):
            raise ValueError(f"text must be the JSON of a diagnosis, but got that of {given(plain)}: {cure}")
        return cls.from_dict(plain)


def grouped(findings: Iterable[Finding]) -> list[FindingGroup]:
    """One entry for each code, in the order of their first findings."""
    groups: dict[str, FindingGroup] = {}
    for f in findings:
        groups.setdefault(f.code, FindingGroup(f.code, f.severity, f.title, f.claims, [])).findings.append(f)
    return list(groups.values())
