from __future__ import annotations

import html
import json
import math
import re
from xml.etree import ElementTree

import pytest

from normwise.lab.plot import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Line, Panel, Scale, number, svg, y_scale
from normwise.lab.plot_effect import effect_svg
from normwise.lab.verdict import Effect, Measured


def drawn(panel: Panel, *, log: bool = False, percent: bool = False) -> ElementTree.Element:
    scale = y_scale([panel], log=log, percent=percent)
    assert scale is not None
    return ElementTree.fromstring(svg(panel, scale, percent=percent))


def points(element: ElementTree.Element, kind: str) -> list[tuple[float, float]]:
    path = element.find(f".//path[@class='{kind}']")
    assert path is not None
    numbers = [float(text) for text in re.findall(r"-?[\d.]+", path.attrib["d"])]
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def test_a_curve_goes_from_edge_to_edge_and_higher_is_up():
    element = drawn(Panel("p", [Line("batch", [0, 5, 10], [1.0, 3.0, 2.0])]))
    (x0, y0), (x1, y1), (x2, y2) = points(element, "curve")
    assert (x0, x1, x2) == pytest.approx((LEFT, (LEFT + WIDTH - RIGHT) / 2, WIDTH - RIGHT), abs=0.1)
    assert TOP <= y1 < y2 < y0 <= HEIGHT - BOTTOM
    assert y2 - y1 == pytest.approx(y0 - y2, abs=0.15)


def test_a_logarithmic_axis_makes_ratios_lengths_and_leaves_out_what_is_not_positive():
    element = drawn(Panel("p", [Line("batch", [0, 1, 2, 3, 4], [100.0, 10.0, 1.0, 0.0, math.nan])]), log=True)
    heights = [y for _, y in points(element, "curve")]
    assert len(heights) == 3
    assert heights[1] - heights[0] == pytest.approx(heights[2] - heights[1], abs=0.15)


def test_the_band_is_low_and_high_and_a_flat_one_is_not_drawn():
    band = Line("batch", [0, 1], [2.0, 2.0], [1.0, 1.0], [3.0, 3.0])
    assert len(points(drawn(Panel("p", [band])), "band")) == 4
    flat = Line("batch", [0, 1], [2.0, 3.0], [2.0, 3.0], [2.0, 3.0])
    assert drawn(Panel("p", [flat])).find(".//path[@class='band']") is None


def test_one_scale_for_all_panels():
    panels = [Panel("a", [Line("x", [0], [1.0])]), Panel("b", [Line("x", [0], [9.0])])]
    scale = y_scale(panels, log=False, percent=False)
    assert (scale.low, scale.high >= 9) == (0, True)
    assert y_scale([Panel("a", [Line("x", [0], [math.nan])])], log=False, percent=False) is None
    shares = y_scale([Panel("a", [Line("x", [0, 1], [0.0, 0.0])])], log=False, percent=True)
    assert shares.low == 0 < shares.high


@pytest.mark.parametrize(
    ("scale", "ticks"),
    [
        (Scale(0, 1, 100), [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (Scale(-3, 7, 100), [-2, 0, 2, 4, 6]),
        (Scale(0.09, 2.2, 100, log=True), [0.1, 0.2, 0.5, 1, 2]),
        (Scale(1e-6, 1e3, 100, log=True), [1e-6, 1e-4, 1e-2, 1, 100]),
        (Scale(0.9, 1.3, 100, log=True), [1]),
    ],
)
def test_ticks_are_round_and_inside(scale, ticks):
    assert scale.ticks(5) == pytest.approx(ticks)


def test_what_hovering_needs_is_in_the_panel():
    panel = Panel("p", [Line("no<rm", [0, 1000], [0.12345, math.nan], [0.1, 0.2], [0.3, 0.4], label="eval")])
    data = json.loads(html.unescape(drawn(panel).attrib["data-lines"]))
    assert data["lines"] == [
        {"norm": "no<rm", "label": "eval", "x": [0, 1000], "y": [0.123, None], "low": [0.1, 0.2], "high": [0.3, 0.4]}
    ]


def test_words_for_who_cannot_see_it():
    element = drawn(Panel("batch size 8", [Line("layer", [0, 1], [0.5, 0.934])]), percent=True)
    assert element.attrib["aria-label"] == "batch size 8; at the right end: layer 93.4%"
    assert element.attrib["tabindex"] == "0"


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (0.1234, "0.123"), (12345.0, "12,345"), (1e-7, "1e-7"), (2.5e8, "2.5e8")]
)
def test_numbers_are_printed_short(value, text):
    assert number(value) == text
    assert number(0.25, percent=True) == "25%"


def test_an_effect_s_interval_and_minimum_are_where_they_belong():
    effect = Effect("x", "points", 1.0, Measured({0: 2.0, 1: 3.0, 2: 4.0}), headroom="none")
    element = ElementTree.fromstring(effect_svg(effect))
    minimum, mean = (
        float(element.find(f".//*[@class='{name}']").attrib[at]) for name, at in (("minimum", "x1"), ("mean", "cx"))
    )
    seeds = [float(dot.attrib["cx"]) for dot in element.iterfind(".//*[@class='seed']")]
    assert minimum < seeds[0] < seeds[1] == mean < seeds[2]
    assert element.attrib["class"] == "effect undecided"
    assert effect_svg(Effect("x", "points", 1.0, Measured({}), headroom="none")) == ""
