"""Panels of curves as SVG, drawn here and not in the browser: they are there without scripts, in print, and as files.

Colours are CSS variables, one a norm, so that the page decides on light and dark. What the script on the page needs for
hovering stands in the attribute ``data-lines`` of each panel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from normwise.lab.strict_json import to_json

WIDTH, HEIGHT = 340, 214
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 24, 36
FEW = 12  # so many points and fewer get a dot each


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


@dataclass(frozen=True)
class Scale:
    """Values to places along an axis of ``length`` pixels."""

    low: float
    high: float
    length: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return self.length * (value - low) / (high - low)

    def ticks(self, most: int) -> list[float]:
        """Round numbers within the scale, at most about ``most`` of them."""
        if self.log:
            return _log_ticks(self.low, self.high, most)
        step = _round_step((self.high - self.low) / most)
        first = math.ceil(self.low / step - 1e-9)
        return [step * i for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * digit for digit in (1, 2, 5, 10) if power * digit >= rough * (1 - 1e-9))


def _log_ticks(low: float, high: float, most: int) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1, 2, 5), (1, 3), (1,)):
        ticks = [d * 10.0**power for power in decades for d in digits]
        inside = [tick for tick in ticks if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]
        if len(inside) <= most + 1 and len(inside) > 1:
            return inside
    every = math.ceil(len(decades) / most)
    return [10.0**power for power in decades if power % every == 0 and low <= 10.0**power <= high]


def y_scale(panels: Sequence[Panel], *, log: bool, percent: bool) -> Scale | None:
    """One scale for all panels of a figure; None where no value is drawn."""
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
    height = HEIGHT - TOP - BOTTOM
    if log:
        if high / low < 1.5:
            low, high = low / 1.25, high * 1.25
        return Scale(low / 1.08, high * 1.08, height, log=True)
    if percent:
        low, high = max(0.0, low), min(1.0, high)
    elif low >= 0 and low < 0.5 * high:
        low = 0.0
    if high - low < 1e-9:
        low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
        low = max(low, 0.0) if percent else low
    return Scale(low, high + 0.02 * (high - low), height)


def number(value: float, *, percent: bool = False) -> str:
    """As on an axis or in a tooltip: three digits."""
    if percent:
        return f"{100 * value:.3g}%"
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.2g}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def svg(panel: Panel, y: Scale, *, percent: bool = False) -> str:
    """The panel as an ``<svg>`` element."""
    x = _x_scale(panel)
    main_on_top = sorted(panel.lines, key=lambda line: line.style == "main")
    parts = [_frame(panel, x, y, percent), *(_line(line, x, y) for line in main_on_top)]
    data = {
        "x": [x.low, x.high, x.log],
        "names": list(panel.x_names),
        "percent": percent,
        "label": panel.x_label,
        "lines": [
            {
                "norm": line.norm,
                "label": line.label,
                "x": [_short(v) for v in line.x],
                "y": [_short(v) for v in line.y],
                **({"low": [_short(v) for v in line.low], "high": [_short(v) for v in line.high]} if line.low else {}),
            }
            for line in panel.lines
        ],
    }
    last = ", ".join(
        f"{line.norm}{' ' * bool(line.label)}{line.label} {number(line.y[-1], percent=percent)}"
        for line in panel.lines
        if line.y and math.isfinite(line.y[-1])
    )
    label = f"{panel.title}; at the right end: {last}"
    text = to_json(data, compact=True)
    return (
        f'<svg class="panel{" other" * (panel.choice > 0)}" viewBox="0 0 {WIDTH} {HEIGHT}" tabindex="0" role="img" '
        f'data-choice="{panel.choice}" aria-label="{escape(label)}" data-lines="{escape(text)}">'
        + "".join(parts)
        + f'<line class="guide" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/></svg>'
    )


def _x_scale(panel: Panel) -> Scale:
    values = [v for line in panel.lines for v in line.x]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if panel.x_names:
        low, high = -0.3, len(panel.x_names) - 0.7
    elif panel.x_log:
        low, high = low / 1.3, high * 1.3
    elif high == low:
        low, high = low - 1, high + 1
    return Scale(low, high, WIDTH - LEFT - RIGHT, panel.x_log)


def _frame(panel: Panel, x: Scale, y: Scale, percent: bool) -> str:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    out = [f'<text class="title" x="{LEFT}" y="14">{escape(panel.title)}</text>']
    if panel.shaded_from is not None and panel.shaded_from < x.high:
        start = LEFT + x(max(panel.shaded_from, x.low))
        out.append(
            f'<rect class="beyond" x="{start:.1f}" y="{TOP}" width="{right - start:.1f}" height="{bottom - TOP}"/>'
        )
    for tick in y.ticks(5):
        place = bottom - y(tick)
        out.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{place:.1f}" y2="{place:.1f}"/>')
        out.append(f'<text class="tick y" x="{LEFT - 6}" y="{place + 3.6:.1f}">{number(tick, percent=percent)}</text>')
    out.append(f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    if panel.x_names:
        named = [(float(at), _fitting(name, len(panel.x_names))) for at, name in enumerate(panel.x_names)]
    elif panel.x_log:
        rates = sorted({v for line in panel.lines for v in line.x})
        named = [(rate, f"{rate:g}") for rate in rates]
    else:
        named = [(tick, number(tick)) for tick in x.ticks(5)]
    for value, name in named:
        out.append(f'<text class="tick x" x="{LEFT + x(value):.1f}" y="{bottom + 14}">{escape(name)}</text>')
    out.append(f'<text class="label" x="{(LEFT + right) / 2}" y="{HEIGHT - 6}">{escape(panel.x_label)}</text>')
    return "".join(out)


def _fitting(name: str, count: int) -> str:
    """A name short enough that ``count`` of them stand side by side; the tooltip has it whole."""
    most = max(3, int((WIDTH - LEFT - RIGHT) / count / 5.6))
    return name if len(name) <= most else "…" + name[-(most - 1) :]


def _line(line: Line, x: Scale, y: Scale) -> str:
    drawn = [(LEFT + x(a), HEIGHT - BOTTOM - y(b)) for a, b in zip(line.x, line.y, strict=True) if _shown(b, y)]
    if not drawn:
        return ""
    out = [f'<g class="line {line.style}" data-norm="{escape(line.norm)}" style="--c:{colour(line.norm)}">']
    if line.low and any(low < high for low, high in zip(line.low, line.high, strict=True)):
        edges = [
            (LEFT + x(a), HEIGHT - BOTTOM - y(max(low, y.low)), HEIGHT - BOTTOM - y(high))
            for a, low, high in zip(line.x, line.low, line.high, strict=True)
            if _shown(high, y) and not math.isnan(low)
        ]
        outline = [(a, high) for a, _, high in edges] + [(a, low) for a, low, _ in reversed(edges)]
        out.append(f'<path class="band" d="M{_points(outline)}Z"/>')
    out.append(f'<path class="curve" d="M{_points(drawn)}"/>')
    if len(drawn) <= FEW and line.style == "main":
        out += [
            f'<circle cx="{a:.1f}" cy="{b:.1f}" r="{5.2 if place == line.marked else 2.6}"/>'
            for place, (a, b) in enumerate(drawn)
        ]
    return "".join([*out, "</g>"])


def _shown(value: float, y: Scale) -> bool:
    return math.isfinite(value) and (value > 0 or not y.log)


def _points(places: Sequence[tuple[float, float]]) -> str:
    return "L".join(f"{a:.1f} {b:.1f}" for a, b in places)


def _short(value: float) -> float | None:
    return (
        float(f"{value:.3g}")
        if math.isfinite(value) and abs(value) < 1000
        else round(value)
        if math.isfinite(value)
        else None
    )


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
