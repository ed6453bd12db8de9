"""A diagnosis as text of 80 columns: findings first, grouped by code, then a line for each layer."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator

from normwise.diagnosis.records import Activations, Diagnosis, FindingGroup, Layer
from normwise.words import counted

WIDTH = 80
NAMED = 8  # layers of a code that are named; all of them are in the page and in the JSON
_NAME, _KIND, _SHAPE, _NUMBER = 22, 14, 15, 7


def as_text(diagnosis: Diagnosis) -> str:
    """Findings with cause and cure, then the table of layers."""
    return "\n".join([*_head(diagnosis), "", *_findings(diagnosis), "", *_layers(diagnosis)]) + "\n"


def _head(d: Diagnosis) -> list[str]:
    words = f"{d.model}: {counted(d.parameters, 'parameter')}, {counted(len(d.layers), 'layer')}, "
    words += counted(d.data.batches, "batch")
    if d.gap is not None and math.isnan(d.gap.output):
        words += "; the outputs of train and eval mode cannot be compared, for they hold NaN or infinity"
    elif d.gap is not None:
        words += f"; the outputs of train and eval mode differ by {d.gap.output:.3g} deviations"
    return textwrap.wrap(words, WIDTH)


def _findings(d: Diagnosis) -> Iterator[str]:
    if not d.findings:
        yield "No findings."
    for group in d.groups:
        yield from _group(group)
    if d.silenced:
        yield f"{len(d.silenced)} more silenced: {', '.join(sorted({f.code for f in d.silenced}))}"
    for note in d.notes:
        yield from textwrap.wrap(f"Note: {note}", WIDTH, subsequent_indent="      ")


def _group(group: FindingGroup) -> Iterator[str]:
    """A finding with cause and cure; of many of a code the layers, and the first as an example."""
    f = group.findings[0]
    many = len(group.findings) > 1
    where = f"{place(group)}: " if many or f.layer else ""
    yield from textwrap.wrap(f"{f.code} {f.severity}  {where}{f.title}", WIDTH, subsequent_indent="    ")
    if many:
        names = group.layers
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        yield from _indented(f"At {', '.join(names[:NAMED])}{more}.")
    of = f"{f.layer}: " if many and f.layer and len({x.cause for x in group.findings}) > 1 else ""
    yield from _indented(of + f.cause)
    of = f", for {f.layer}" if many and f.layer and len({x.cure for x in group.findings}) > 1 else ""
    yield from _indented(f"Cure{of}: {f.cure}")


def place(group: FindingGroup) -> str:
    """Where it is so: the layer's name, or how many there are."""
    if len(group.findings) == 1:
        return group.layers[0] if group.layers else "the model"
    count = len(group.layers)
    layers, findings = counted(count, "layer"), counted(len(group.findings), "finding")
    return layers if count == len(group.findings) else f"{layers}, {findings}"


def _indented(words: str) -> list[str]:
    # A cure is a call to be copied: it is not broken in the middle of a word.
    return textwrap.wrap(
        words,
        WIDTH,
        initial_indent="    ",
        subsequent_indent="    ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _layers(d: Diagnosis) -> Iterator[str]:
    yield _line("layer", "class", "output", "mean", "std", "grad")
    yield "-" * WIDTH
    for layer in d.layers:
        yield _layer(layer)
    yield "-" * WIDTH
    yield "output, mean, std: in train mode; grad: of the loss, at the output."
    opening = sorted((x for x in d.layers if x.gap), key=lambda x: -(x.gap or 0))[:5]
    if opening:
        who = ", ".join(f"{x.name or d.model} {number(x.gap)}" for x in opening)
        yield from textwrap.wrap(
            f"Change of the model's output, in its deviations, with one layer alone in train mode: {who}.", WIDTH
        )


def _layer(layer: Layer) -> str:
    shape, *numbers = _cells(layer)
    return _line(layer.name or "(the model)", layer.kind, shape, *(number(value) for value in numbers))


def _cells(layer: Layer) -> tuple[str, float | None, float | None, float | None]:
    out = layer.output
    gradient = layer.gradient.output if layer.gradient is not None else None
    shape = "never called" if layer.order is None else _shape(out)
    return (shape, None, None, gradient) if out is None else (shape, out.all.mean, out.all.std, gradient)


def described(layer: Layer) -> str:
    """A layer's line of the table as words, for its repr."""
    shape, *numbers = _cells(layer)
    words = [f"{word} {number(x)}" for word, x in zip(("mean", "std", "grad"), numbers, strict=True) if x is not None]
    called = shape if layer.order is None else f"output {shape}"
    return ", ".join([f"{layer.name!r}: {layer.kind}", *([called] if shape else []), *words])


def _line(name: str, kind: str, shape: str, *numbers: str) -> str:
    cells = [_fit(name, _NAME).ljust(_NAME), _fit(kind, _KIND).ljust(_KIND), _fit(shape, _SHAPE).ljust(_SHAPE)]
    return (" ".join(cells) + " " + " ".join(n.rjust(_NUMBER) for n in numbers)).rstrip()


def _shape(a: Activations | None) -> str:
    return "" if a is None else "x".join(map(str, a.shape))


def _fit(words: str, width: int) -> str:
    """The end of a name says more than its beginning."""
    return words if len(words) <= width else "..." + words[len(words) - width + 3 :]


def number(value: float | None) -> str:
    """To three digits, in at most seven characters; nothing for what was not measured."""
    if value is None:
        return ""
    if not math.isfinite(value):
        return str(value)
    text = f"{value:.3g}"
    return text if len(text) <= _NUMBER else f"{value:.0e}"
