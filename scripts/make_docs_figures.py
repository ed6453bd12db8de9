"""Draws the figures of the tutorial that need no run of the lab: docs/tutorial/{axes,sigmoid}.svg.

    python scripts/make_docs_figures.py

Plain SVG, so that a reader's browser needs nothing else and a change of a figure can be read as a diff.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

OUT = Path(__file__).parent.parent / "docs" / "tutorial"

INK, FAINT, BLUE, ORANGE, PAPER = "#222222", "#b8b8b8", "#0072b2", "#d55e00", "#ffffff"  # Okabe & Ito's blue and orange
FONT = 'font-family="system-ui, sans-serif"'


def svg(width: int, height: int, title: str, parts: list[str]) -> str:
    """A picture on paper of its own, readable on a dark page too."""
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">\n<title>{title}</title>\n'
        f'<rect width="{width}" height="{height}" rx="8" fill="{PAPER}"/>\n{body}\n</svg>\n'
    )


def text(x: float, y: float, words: str, size: int = 15, anchor: str = "middle", fill: str = INK) -> str:
    return f'<text x="{x:g}" y="{y:g}" {FONT} font-size="{size}" text-anchor="{anchor}" fill="{fill}">{words}</text>'


def axes() -> str:
    """One table twice: the cells that share a mean have one colour."""
    names, rows, cols, cell = ("BatchNorm", "LayerNorm"), 5, 3, 40
    parts = []
    for k, name in enumerate(names):
        left, top = 110 + 330 * k, 78
        parts.append(text(left + cols * cell / 2, 32, name, 19))
        parts.append(text(left + cols * cell / 2, 62, "features", 14, fill="#555555"))
        for i in range(rows):
            parts.append(text(left - 12, top + i * cell + 25, f"sample {i + 1}", 14, "end", "#555555"))
            for j in range(cols):
                mine = j == 1 if k == 0 else i == 1
                fill = (BLUE if k == 0 else ORANGE) if mine else "#f0f0f0"
                parts.append(
                    f'<rect x="{left + j * cell}" y="{top + i * cell}" width="{cell - 3}" height="{cell - 3}" rx="4" '
                    f'fill="{fill}"/>'
                )
        what = ("one mean and variance", "for each feature") if k == 0 else ("one mean and variance", "for each sample")
        for line, words in enumerate(what):
            parts.append(text(left + cols * cell / 2, top + rows * cell + 24 + 20 * line, words))
    return svg(620, 340, "Batch norm: one mean a column. Layer norm: one mean a row.", parts)


def sigmoid() -> str:
    """The sigmoid, its slope, and the part beyond 6 where nothing passes."""
    left, right, top, bottom = 60, 590, 30, 250

    def at(x: float, y: float) -> tuple[float, float]:
        return left + (x + 10) / 20 * (right - left), bottom - y * (bottom - top)

    def path(f: Callable[[float], float], colour: str, dash: str = "") -> str:
        points = [at(i / 10, f(i / 10)) for i in range(-100, 101)]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        return f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="3"{dash}/>'

    def value(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    parts = []
    for begin, end in ((-10, -6), (6, 10)):
        (x0, _), (x1, _) = at(begin, 0), at(end, 0)
        parts.append(f'<rect x="{x0:g}" y="{top}" width="{x1 - x0:g}" height="{bottom - top}" fill="#eeeeee"/>')
        parts.append(text((x0 + x1) / 2, top + 118, "saturated", 14, fill="#555555"))
    parts.append(f'<line x1="{left}" y1="{bottom}" x2="{right}" y2="{bottom}" stroke="{FAINT}"/>')
    parts.append(path(value, BLUE))
    parts.append(path(lambda x: value(x) * (1 - value(x)), ORANGE, ' stroke-dasharray="8 5"'))
    parts += [text(at(x, 0)[0], bottom + 22, f"{x}".replace("-", "\N{MINUS SIGN}"), 14) for x in (-10, -6, 0, 6, 10)]
    parts += [text(left - 10, at(0, y)[1] + 5, f"{y:g}", 14, "end") for y in (0, 0.25, 1)]
    parts.append(text(at(2.1, 0)[0], at(0, 0.93)[1], "sigmoid", 15, "end", BLUE))
    parts.append(text(at(-1.9, 0)[0], at(0, 0.26)[1], "its slope", 15, "end", ORANGE))
    parts.append(text((left + right) / 2, bottom + 44, "input of the unit", 14, fill="#555555"))
    return svg(620, 310, "The sigmoid and its slope, which is 0.0025 at 6", parts)


def main() -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    for name, picture in (("axes", axes()), ("sigmoid", sigmoid())):
        (OUT / f"{name}.svg").write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main()
