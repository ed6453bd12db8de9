"""The report's figures over the time steps of sequences: a small panel for each batch size and norm."""

from __future__ import annotations

from collections.abc import Sequence

from normwise.lab.figures import Figure, line
from normwise.lab.plot import Panel
from normwise.lab.score import Band, Row, band

# What each quantity is called, the modes that are drawn, and its caption.
QUANTITIES: dict[str, tuple[str, tuple[str, ...], str]] = {
    "summed": (
        "Size of the summed inputs over the time steps",
        ("eval", "train"),
        "Root mean square, over the units and over the held-out sequences that are still running at a step, of what "
        "the nonlinearities see, behind the norms.",
    ),
    "unnormalized": (
        "Size of the summed inputs before any norm",
        ("eval", "train"),
        "The same for W_ih x + W_hh h alone: what the norms, where there are any, have to deal with.",
    ),
    "gradient": (
        "Gradient norm over the time steps",
        ("train",),
        "Root mean square, over the held-out sequences that are still running at a step, of the norm of the gradient "
        "of a sequence's own loss with respect to the hidden state of that step (in the transformer: to the embedded "
        "frame). Where a curve falls to the left, little of the loss reaches the early steps; a sequence that the net "
        "is sure of has a small one throughout. Train mode.",
    ),
}
HOW_TO_READ = {
    ("eval", "train"): " Thick: after the training, eval mode; dotted: also in train mode; thin: before, eval mode.",
    ("train",): " Thick: after the training; thin: before it.",
}


def over_time(rows: Sequence[Row]) -> list[Figure]:
    """The figures of one task for which its runs have series."""
    shown = [row for row in rows if row.stats]
    found = [name for name in QUANTITIES if any(f"over-time/{name}/" in s for r in shown for s in r.runs[0].series)]
    return [_figure(shown, name) for name in found]


def _figure(rows: Sequence[Row], quantity: str) -> Figure:
    title, modes, caption = QUANTITIES[quantity]
    panels = []
    for row in rows:
        lines = []
        for mode in modes:
            for when in ("start", "end"):
                curve = band(row.runs, f"over-time/{quantity}/{mode}/{when}")
                if curve is not None and (when == "end" or mode == modes[0]):
                    style = "thin" if when == "start" else "main" if mode == modes[0] else "dotted"
                    lines.append(line(row.norm, _from_one(curve), style=style, label=f"{mode} mode, {when}"))
        if lines:
            title_of_panel = f"{row.norm}, batch size {row.batch_size}"
            longest = _longest(row)
            beyond = longest + 0.5 if longest else None
            panels.append(Panel(title_of_panel, lines, x_label="time step", shaded_from=beyond))
    shade = " Grey: steps beyond the longest sequence in training." if _longest(rows[0]) else ""
    return Figure(title, caption + HOW_TO_READ[modes] + shade, panels, log=True)


def _from_one(curve: Band) -> Band:
    """Time steps are counted from 1."""
    return Band([step + 1 for step in curve.steps], curve.mean, curve.low, curve.high)


def _longest(row: Row) -> float:
    """Steps of the longest sequence in training; 0 where the runs do not say."""
    series = row.runs[0].series.get("train/longest")
    return series.values[0] if series else 0
