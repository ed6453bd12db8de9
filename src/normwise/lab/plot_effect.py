"""An effect as one small line: every seed, the interval of their mean, and what the claim asks for at least."""

from __future__ import annotations

from functools import cache
from html import escape
from typing import Any

from normwise.lab.chart import fill, to_svg
from normwise.lab.verdict import Effect

WIDTH, HEIGHT = 244, 22


def effect_svg(effect: Effect) -> str:
    """A picture with its words, as an element; "" for an effect without runs."""
    if effect.mean is None:
        return ""
    low, high = effect.interval or (effect.mean, effect.mean)
    ends = [*effect.values, low, high, effect.minimum, 0.0]
    span = (max(ends) - min(ends)) or 1.0
    domain = [min(ends) - 0.03 * span, max(ends) + 0.03 * span]
    told = [0.0, effect.minimum] if abs(effect.minimum) / span > 0.1 else [effect.minimum]
    drawn = fill(
        _template(),
        {
            "$domain": domain,
            "$told": told,
            "$values": [{"x": value} for value in effect.values],
            "$interval": [{"x": low, "x2": high}],
            "$claimed": [{"x": effect.minimum, "x2": domain[1]}],
            "$zero": [{"x": 0.0}],
            "$mean": [{"x": effect.mean}],
        },
    )
    text = f"{effect.mean:.3g} {effect.unit}, interval {low:.3g} to {high:.3g}, claimed at least {effect.minimum:g}"
    return (
        f'<div class="effect {effect.verdict.replace(" ", "-")}" role="img" aria-label="{escape(text, quote=True)}">'
        f"{to_svg(drawn)}</div>"
    )


@cache
def _template() -> dict[str, Any]:
    import altair as alt
    from altair.utils.schemapi import debug_mode

    with debug_mode(False):  # a place, such as "$domain", is not what the schema expects there
        labels = "format(datum.value, '~g')"  # by `format=` Vega takes fewer digits: 5e+1 for 50
        axis = alt.Axis(values="$told", title=None, grid=False, domain=False, labelExpr=labels, labelFontSize=10)
        x = alt.X("x:Q", scale=alt.Scale(domain="$domain", nice=False, zero=False), axis=axis)

        def of(values: str) -> alt.Chart:
            return alt.Chart(alt.InlineData(values=values)).encode(x=x)

        drawn = alt.layer(
            of("$claimed").mark_rect(color="var(--heat)", opacity=0.16).encode(x2="x2:Q"),
            of("$zero").mark_rule(color="var(--line)"),
            of("$claimed").mark_rule(color="var(--soft)", strokeDash=[2, 2]),
            of("$interval").mark_rule(color="var(--v)", strokeWidth=3).encode(x2="x2:Q"),
            of("$values").mark_circle(color="var(--ink)", opacity=0.45, size=18),
            of("$mean").mark_circle(color="var(--v)", opacity=1, size=62),
        )
        made: dict[str, Any] = drawn.properties(width=WIDTH, height=HEIGHT).to_dict(validate=False)
    return made
