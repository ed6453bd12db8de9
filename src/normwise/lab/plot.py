"""What a report draws: panels of curves, their axes' ends, their words and colours. ``lab/chart.py`` draws them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Line:
    """One curve. ``low`` and ``high`` are the band over the seeds; ``marked`` is the index of the point that counts."""

    norm: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    style: str = "main"
    """"main", "dotted" or "thin"."""
    label: str = ""
    """What it is, beside the norm: "train mode"."""
    marked: int | None = None


@dataclass(frozen=True)
class Panel:
    """One small diagram. ``choice`` is the group it belongs to, of which the reader sees one at a time."""

    title: str
    lines: Sequence[Line]
    x_label: str = "step"
    x_names: Sequence[str] = ()
    """Names of the places 0, 1, .. on the x axis, where it is no scale."""
    x_log: bool = False
    shaded_from: float | None = None
    choice: int = 0


def y_domain(panels: Sequence[Panel], *, log: bool, percent: bool) -> tuple[float, float] | None:
    """One for all panels of a figure; None where no value is drawn."""
    values = [
        v
        for panel in panels
        for line in panel.lines
        for v in (*line.y, *line.low, *line.high)
        if math.isfinite(v) and (v > 0 or not log)
    ]
    if not values:
        return None
    low, high = min(values), max(values)
    if log:
        room = 1.25 if high / low < 1.5 else 1.08
        return low / room, high * room
    if percent:
        low, high = max(0.0, low), min(1.0, high)
    elif low >= 0 and low < 0.5 * high:
        low = 0.0
    if high - low < 1e-9:
        low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
        low = max(low, 0.0) if percent else low
    return low, high + 0.02 * (high - low)


def x_domain(panel: Panel) -> tuple[float, float]:
    values = [v for line in panel.lines for v in line.x]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if panel.x_names:
        return -0.3, len(panel.x_names) - 0.7
    if panel.x_log:
        return low / 1.3, high * 1.3
    return (low, high) if high > low else (low - 1, high + 1)


def number(value: float, *, percent: bool = False) -> str:
    """As in words: three digits."""
    if percent:
        return f"{100 * value:.3g}%"
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.2g}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def words(panel: Panel, *, percent: bool = False) -> str:
    """For who cannot see it: where each curve ends."""
    last = ", ".join(
        f"{line.norm}{' ' * bool(line.label)}{line.label} {number(line.y[-1], percent=percent)}"
        for line in panel.lines
        if line.y and math.isfinite(line.y[-1])
    )
    return f"{panel.title}; at the right end: {last}"


# Okabe & Ito's colours, which people of every colour vision tell apart; the page has a lighter set for dark screens.
VARIABLES = {
    "none": "grey",
    "batch": "blue",
    "layer": "vermilion",
    "group": "green",
    "instance": "purple",
    "rms": "orange",
    "layer-plain": "ink",
    "batch-masked": "sky",
    "batch-per-step": "blue",
    "batch-time-average": "sky",
    "batch-input": "green",
}


def colour(norm: str) -> str:
    """The norm's colour as CSS; a name of a user's own gets one of three."""
    name = VARIABLES.get(norm) or ("sky", "ink", "purple")[sum(map(ord, norm)) % 3]
    return f"var(--{name})"
