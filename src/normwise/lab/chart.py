"""Panels of curves as Vega-Lite charts, made with Altair.

A page carries each panel's numbers, and once each kind of chart (``template``): a chart is a template with a panel's
``fields`` in its places (``fill``, which the page's script does as well). vl-convert draws it as SVG, so that it is
there in print and without scripts, and brings the script that makes it live. Colours are CSS variables, one a norm:
the page decides on light and dark.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from normwise.lab.plot import Line, Panel, colour, words, x_domain, y_domain
from normwise.lab.strict_json import to_json

WIDTH, HEIGHT = 286, 154  # of the plot alone, as it is before scripts run and in files
FEW = 12  # so many points and fewer get a dot each


def fields(panel: Panel, y: tuple[float, float], *, log: bool = False) -> dict[str, Any]:
    """What goes into the places of the template, by their names; all of it is JSON."""
    x = x_domain(panel)
    norms = list(dict.fromkeys(line.norm for line in panel.lines))
    drawn = sorted(panel.lines, key=lambda line: line.style == "main")  # the main ones on top
    shade = [] if panel.shaded_from is None or panel.shaded_from >= x[1] else [max(panel.shaded_from, x[0]), x[1]]
    names = [_fitting(name, len(panel.x_names)) for name in panel.x_names]
    return {
        "$title": panel.title,
        "$label": panel.x_label,
        "$x": list(x),
        "$y": list(y),
        "$ticks": list(range(len(names))) if names else sorted({v for line in panel.lines for v in line.x}),
        "$names": f"{json.dumps(names)}[datum.value]",
        "$places": list(panel.x_names),
        "$norms": norms,
        "$colours": [colour(norm) for norm in norms],
        "$shade": [{"from": shade[0], "to": shade[1]}] if shade else [],
        "$rows": [_row(line, log=log) for line in drawn],
    }


def _row(line: Line, *, log: bool) -> dict[str, Any]:
    band = bool(line.low) and any(low < high for low, high in zip(line.low, line.high, strict=True))
    sizes = [110 if at == line.marked else 28 for at in range(len(line.x))]
    return {
        "norm": line.norm,
        "label": line.label,
        "style": line.style,
        "x": [_short(v) for v in line.x],
        "y": [_short(v, positive=log) for v in line.y],
        "low": [_short(v, positive=log) for v in line.low] if band else [],
        "high": [_short(v, positive=log) for v in line.high] if band else [],
        "size": sizes if len(line.x) <= FEW and line.style == "main" else [],
    }


def _short(value: float, *, positive: bool = False) -> float | None:
    """Three digits; None for what has no place on the axis."""
    if not math.isfinite(value) or (positive and value <= 0):
        return None
    return float(f"{value:.3g}") if abs(value) < 1000 else round(value)


def _fitting(name: str, count: int) -> str:
    """A name short enough that ``count`` of them stand side by side; the tooltip has it whole."""
    most = max(3, int(WIDTH / count / 5.6))
    return name if len(name) <= most else "…" + name[-(most - 1) :]


@cache
def template(name: str) -> dict[str, Any]:
    """A chart with places ("$title", ..) for a panel's fields. Its name is that of its axes: across "scale", "log" or
    "names", up "scale", "percent", "log" or "log-percent"."""
    import altair as alt  # only here: what draws nothing shall not wait for it
    from altair.utils.schemapi import debug_mode

    x, _, y = name.partition("/")
    log, percent = "log" in y, "percent" in y
    with debug_mode(False):  # a place is not what the schema expects there
        kinds: list[dict[str, Any]] = [{"zero": False}, {"type": "log"}]
        ticks = {} if x == "scale" else {"values": "$ticks", "labelOverlap": x == "log"}
        ticks |= {"labelExpr": "$names"} if x == "names" else {"format": "~g"} if x == "log" else {"tickCount": 5}
        x_axis = alt.Axis(title="$label", grid=False, **ticks)
        x_scale = alt.Scale(domain="$x", nice=False, padding=3, **kinds[x == "log"])
        y_format = ".3~p" if percent else "~g" if log else ".3~g"
        # On a logarithmic axis 1, 2 and 5 of each decade alone; the labels give way where there are many.
        round_one = "indexof([1, 2, 5], round(datum.value / pow(10, floor(log(datum.value) / LN10 + 1e-9)))) >= 0"
        grid = alt.condition(round_one, alt.value(1), alt.value(0))
        few = {"gridOpacity": grid, "labelExpr": f"{round_one} ? format(datum.value, '{y_format}') : ''"} if log else {}
        y_axis = alt.Axis(title=None, format=y_format, tickCount=4, minExtent=34, **few)
        y_scale = alt.Scale(domain="$y", nice=False, padding=3, **kinds[log])
        norm = alt.Color("norm:N", scale=alt.Scale(domain="$norms", range="$colours"), legend=None)
        styles = ["thin", "dotted", "main"]

        def at(field: str) -> alt.X:
            return alt.X(f"{field}:Q", scale=x_scale, axis=x_axis)

        def up(field: str) -> alt.Y:
            return alt.Y(f"{field}:Q", scale=y_scale, axis=y_axis)

        zoom = alt.selection_interval(name="zoom", bind="scales", zoom="wheel![event.shiftKey]")
        curve = alt.Chart().transform_flatten(["x", "y", "low", "high", "size"])
        layers = [
            alt.Chart(alt.InlineData(values="$shade", name="shade"))
            .mark_rect(clip=True, color="var(--soft)", opacity=0.14)
            .encode(x=at("from"), x2="to:Q"),
            curve.transform_filter("isValid(datum.high)")
            .transform_calculate(floor="isValid(datum.low) ? datum.low : domain('y')[0]")
            .mark_area(clip=True, opacity=0.16)
            .encode(x=at("x"), y=up("floor"), y2="high:Q", color=norm, detail="label:N"),
            curve.mark_line(clip=True, invalid="break-paths-filter-domains")
            .encode(
                x=at("x"),
                y=up("y"),
                color=norm,
                detail="label:N",
                strokeDash=alt.StrokeDash(
                    "style:N", scale=alt.Scale(domain=styles, range=[[1, 0], [2, 3], [1, 0]]), legend=None
                ),
                strokeWidth=alt.condition("datum.style == 'thin'", alt.value(1), alt.value(2)),
            )
            .add_params(zoom),
            curve.transform_filter("isValid(datum.size) && isValid(datum.y)")
            .mark_circle(clip=True, opacity=1)
            .encode(x=at("x"), y=up("y"), color=norm, size=alt.Size("size:Q", scale=None)),
            alt.Chart(alt.InlineData(values=[], name="at")).mark_rule(clip=True, color="var(--soft)").encode(x=at("x")),
        ]
        chart = alt.layer(*layers, data=alt.InlineData(values="$rows", name="rows"), title="$title")
        chart = chart.properties(width=WIDTH, height=HEIGHT)
        made: dict[str, Any] = chart.to_dict(validate=False)
    return {name: part for name, part in made.items() if name not in ("$schema", "config")}


# Fonts, lines and colours of every chart.
CONFIG: dict[str, Any] = {
    "aria": False,  # a panel is one picture to a screen reader, with a sentence (``words``)
    "background": None,
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "title": {
        "anchor": "start",
        "frame": "group",
        "fontSize": 12.5,
        "color": "var(--ink)",
        "subtitleColor": "var(--soft)",
        "offset": 8,
    },
    "axis": {
        "labelColor": "var(--soft)",
        "titleColor": "var(--soft)",
        "labelFontSize": 11,
        "titleFontSize": 11,
        "titleFontWeight": "normal",
        "gridColor": "var(--line)",
        "domainColor": "var(--soft)",
        "ticks": False,
        "labelPadding": 5,
    },
    "axisY": {"domain": False},
    "legend": {"labelColor": "var(--ink)", "titleColor": "var(--soft)", "symbolOpacity": 1},
}


@dataclass(frozen=True)
class Chart:
    """A panel ready to be drawn: the name of its template, and what goes into it."""

    panel: Panel
    template: str
    fields: dict[str, Any]
    words: str

    @property
    def attribute(self) -> str:
        """For the page's script, as an attribute between single quotes: JSON has many double ones."""
        found = to_json({"template": self.template, **self.fields}, compact=True)
        return found.replace("&", "&amp;").replace("'", "&#39;").replace("<", "&lt;")

    @property
    def spec(self) -> dict[str, Any]:
        """The chart whole."""
        filled: dict[str, Any] = fill(template(self.template), self.fields)
        return filled

    @property
    def svg(self) -> str:
        """An ``<svg>`` element, as long as no script has made it live."""
        return to_svg(still(self.spec))


def charts(panels: Sequence[Panel], *, log: bool, percent: bool) -> list[Chart]:
    """On one y axis; none where no value is drawn."""
    y = y_domain(panels, log=log, percent=percent)
    if y is None:
        return []
    kinds = ["names" if panel.x_names else "log" if panel.x_log else "scale" for panel in panels]
    up = "log" if log else "percent" if percent else "scale"
    up = "log-percent" if log and percent else up
    return [
        Chart(panel, f"{kind}/{up}", fields(panel, y, log=log), words(panel, percent=percent))
        for panel, kind in zip(panels, kinds, strict=True)
    ]


def fill(place: Any, given: Mapping[str, Any]) -> Any:
    """The template with every place filled."""
    if isinstance(place, dict):
        return {name: fill(part, given) for name, part in place.items()}
    if isinstance(place, list):
        return [fill(part, given) for part in place]
    return given.get(place, place) if isinstance(place, str) else place


def still(spec: Mapping[str, Any]) -> dict[str, Any]:
    """A panel's chart without what needs a script: moving it, and the line where the pointer is."""
    made: dict[str, Any] = _alone({**spec, "layer": spec["layer"][:-1]})
    return made


def _alone(place: Any) -> Any:
    """Without parameters and names, of which there may be no two where several panels are one chart."""
    if isinstance(place, list):
        return [_alone(part) for part in place]
    if not isinstance(place, dict):
        return place
    return {name: _alone(part) for name, part in place.items() if name not in ("params", "name")}


# A third of what Vega writes: grid lines and frames that are not drawn, what the page's style says, and roles inside of
# what is one picture to a screen reader.
_UNSEEN = re.compile(
    r'<line [^>]* opacity="0"/>|<path class="foreground"[^>]* display="none"/>|'
    r'<path class="background"(?:(?! fill=| stroke=)[^>])*/>|'
    r' (?:pointer-events|aria-hidden|role|aria-roledescription|font-family)="[^"]*"'
)


def _to_tenths(tag: str) -> str:
    """Lengths of a tag, in pixels; opacities are as they are."""
    return re.sub(r'(?<!opacity=")\d+\.\d\d+', lambda found: f"{float(found[0]):.1f}", tag)


def to_svg(spec: Mapping[str, Any]) -> str:
    """A chart as an ``<svg>`` element."""
    import vl_convert

    drawn: str = vl_convert.vegalite_to_svg({**spec, "config": CONFIG})
    drawn = re.sub(r"<[^>]+>", lambda tag: _to_tenths(tag[0]), drawn)  # a tag: the text between two is as it is
    drawn = _UNSEEN.sub("", drawn)
    # Its clip is its own: every picture calls the first one clip0, as does what a script draws.
    return re.sub(r'(?<=id=")(?=clip)|(?<=url\(#)(?=clip)', f"{zlib.crc32(drawn.encode()):x}-", drawn)


@cache
def library() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script, ``vegaEmbed``."""
    import vl_convert

    script: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return script.replace("</script", "<\\/script").replace("<!--", "<\\!--")
