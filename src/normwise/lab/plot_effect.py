"""An effect as one small line: every seed, the interval of their mean, and what the claim asks for at least."""

from __future__ import annotations

from html import escape

from normwise.lab.plot import Scale
from normwise.lab.verdict import Effect

WIDTH, HEIGHT, EDGE = 260, 34, 8


def effect_svg(effect: Effect) -> str:
    """An ``<svg>`` element; "" for an effect without runs."""
    if effect.mean is None:
        return ""
    low, high = effect.interval or (effect.mean, effect.mean)
    ends = [*effect.values, low, high, effect.minimum, 0.0]
    span = (max(ends) - min(ends)) or 1.0
    scale = Scale(min(ends) - 0.03 * span, max(ends) + 0.03 * span, WIDTH - 2 * EDGE)

    def at(value: float) -> str:
        return f"{EDGE + scale(value):.1f}"

    minimum, zero = at(effect.minimum), at(0.0)
    dots = "".join(f'<circle class="seed" cx="{at(value)}" cy="13" r="2.4"/>' for value in effect.values)
    text = f"{effect.mean:.3g} {effect.unit}, interval {low:.3g} to {high:.3g}, claimed at least {effect.minimum:g}"
    return (
        f'<svg class="effect {effect.verdict.replace(" ", "-")}" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(text, quote=True)}">'
        f'<rect class="claimed" x="{minimum}" y="3" width="{WIDTH - float(minimum):.1f}" height="20"/>'
        f'<line class="zero" x1="{zero}" x2="{zero}" y1="3" y2="23"/>'
        f'<line class="minimum" x1="{minimum}" x2="{minimum}" y1="3" y2="23"/>'
        f'<line class="interval" x1="{at(low)}" x2="{at(high)}" y1="13" y2="13"/>{dots}'
        f'<circle class="mean" cx="{at(effect.mean)}" cy="13" r="4.4"/>'
        + (f'<text x="{zero}" y="33">0</text>' if abs(float(zero) - float(minimum)) > 24 else "")
        + f'<text x="{minimum}" y="33">{effect.minimum:g}</text></svg>'
    )
