"""The heat map of norm by batch size as a chart: on the page it is a table, and this is what is saved of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def heat_map(title: str, squares: Sequence[tuple[str, int, float, str]]) -> dict[str, Any]:
    """A square for each norm, batch size, heat (0 to 100) and text, in the order given."""
    import altair as alt

    rows = [{"norm": norm, "size": str(size), "heat": heat, "text": text} for norm, size, heat, text in squares]
    chart = alt.Chart(alt.InlineData(values=rows)).encode(
        alt.X("size:N", sort=None, title="batch size", axis=alt.Axis(orient="top", labelAngle=0, domain=False)),
        alt.Y("norm:N", sort=None, title=None),
    )
    heat = alt.Opacity("heat:Q", scale=alt.Scale(domain=[0, 100], range=[0, 1]), legend=None)
    drawn = alt.layer(
        chart.mark_rect(color="var(--heat)", cornerRadius=5, stroke="var(--card)", strokeWidth=3).encode(opacity=heat),
        chart.mark_text(color="var(--ink)").encode(text="text:N"),
    )
    made: dict[str, Any] = drawn.properties(title=title, width=alt.Step(96), height=alt.Step(34)).to_dict()
    return {name: part for name, part in made.items() if name not in ("$schema", "config")}
