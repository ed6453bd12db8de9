from __future__ import annotations

import html
import json
import math
import re
from xml.etree import ElementTree

import pytest

from normwise.lab.chart import FEW, Chart, charts, library
from normwise.lab.plot import Line, Panel, colour, number, x_domain, y_domain
from normwise.lab.plot_effect import effect_svg
from normwise.lab.verdict import Effect, Measured

SVG = "{http://www.w3.org/2000/svg}"


def chart(panel: Panel, *, log: bool = False, percent: bool = False) -> Chart:
    (one,) = charts([panel], log=log, percent=percent)
    return one


def points(element: ElementTree.Element, mark: str) -> list[tuple[float, float]]:
    """Of the first path of a mark."""
    path = next(group for group in element.iter(f"{SVG}g") if group.attrib.get("class", "").startswith(mark))[0]
    numbers = [float(text) for text in re.findall(r"-?[\d.]+", path.attrib["d"])]
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def drawn(panel: Panel, *, log: bool = False, percent: bool = False) -> ElementTree.Element:
    return ElementTree.fromstring(chart(panel, log=log, percent=percent).svg)


def test_a_curve_has_a_point_for_each_value_from_edge_to_edge_and_higher_is_up():
    (x0, y0), (x1, y1), (x2, y2) = points(drawn(Panel("p", [Line("batch", [0, 5, 10], [1.0, 3.0, 2.0])])), "mark-line")
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.15)
    assert y1 < y2 < y0
    assert y2 - y1 == pytest.approx(y0 - y2, abs=0.2)


def test_a_logarithmic_axis_makes_ratios_lengths_and_leaves_out_what_is_not_positive():
    panel = Panel("p", [Line("batch", [0, 1, 2, 3, 4, 5], [100.0, 10.0, 1.0, 0.0, math.nan, math.inf])])
    heights = [y for _, y in points(drawn(panel, log=True), "mark-line")]
    assert len(heights) == 3
    assert heights[1] - heights[0] == pytest.approx(heights[2] - heights[1], abs=0.2)


def test_a_curve_is_broken_where_a_value_is_not_finite():
    panel = Panel("p", [Line("batch", range(5), [1.0, 2.0, math.nan, 2.0, 1.0])])
    lines = [path for path in drawn(panel).iter(f"{SVG}path") if path.attrib.get("d", "").count("M") == 2]
    assert len(lines) == 1


def test_the_band_is_low_and_high_and_a_flat_one_is_not_drawn():
    band = Line("batch", [0, 1], [2.0, 2.0], [1.0, 1.0], [3.0, 3.0])
    assert len(points(drawn(Panel("p", [band])), "mark-area")) == 4
    flat = Line("batch", [0, 1], [2.0, 3.0], [2.0, 3.0], [2.0, 3.0])
    assert chart(Panel("p", [flat])).fields["$rows"][0]["high"] == []


def test_few_points_get_a_dot_each_and_the_one_that_counts_a_large_one():
    sizes = chart(Panel("p", [Line("batch", [0, 1, 2], [1.0, 2.0, 3.0], marked=1)])).fields["$rows"][0]["size"]
    assert sizes[0] == sizes[2] < sizes[1]
    many = Line("batch", range(FEW + 1), [1.0] * (FEW + 1))
    assert chart(Panel("p", [many])).fields["$rows"][0]["size"] == []


def test_one_scale_for_all_panels():
    panels = [Panel("a", [Line("x", [0], [1.0])]), Panel("b", [Line("x", [0], [9.0])])]
    assert len({tuple(one.fields["$y"]) for one in charts(panels, log=False, percent=False)}) == 1
    low, high = y_domain(panels, log=False, percent=False)
    assert (low, high >= 9) == (0, True)
    assert charts([Panel("a", [Line("x", [0], [math.nan])])], log=False, percent=False) == []
    assert charts([], log=True, percent=False) == []
    low, high = y_domain([Panel("a", [Line("x", [0, 1], [0.0, 0.0])])], log=False, percent=True)
    assert low == 0 < high


def test_one_point_has_an_axis_around_it():
    low, high = x_domain(Panel("p", [Line("batch", [7], [1.0])]))
    assert low < 7 < high
    assert "<svg" in chart(Panel("p", [Line("batch", [7], [1.0])])).svg


def test_what_a_script_needs_is_json():
    panel = Panel("p", [Line("no<rm", [0, 1000], [0.12345, math.nan], [0.1, 0.2], [0.3, 0.4], label="eval")])
    data = json.loads(html.unescape(chart(panel).attribute))
    (row,) = data["$rows"]
    assert (row["norm"], row["label"], row["x"], row["y"]) == ("no<rm", "eval", [0, 1000], [0.123, None])
    assert (row["low"], row["high"]) == ([0.1, 0.2], [0.3, 0.4])
    assert data["$norms"] == ["no<rm"]


def test_any_name_is_text_in_the_picture():
    odd = """<b a="1">&'];alert(1)//"""
    element = drawn(Panel(odd, [Line(odd, [0, 1], [1.0, 2.0])], x_names=[odd, "$title"], x_label=odd))
    texts = ["".join(text.itertext()) for text in element.iter(f"{SVG}text")]
    assert texts.count(odd) == 3  # the title, a place on the axis, and what the axis shows
    assert "$title" in texts
    assert not list(element.iter(f"{SVG}b"))


def test_two_pictures_on_a_page_do_not_share_a_clip():
    clips = [set(re.findall(r'id="([^"]*)"', chart(Panel(t, [Line("batch", [0, 1], [1.0, 2.0])])).svg)) for t in "ab"]
    assert all(clips)
    assert not clips[0] & clips[1]


def test_forty_norms_are_forty_curves():
    lines = [Line(f"norm{i}", [0, 1], [float(i), i + 1.0]) for i in range(40)]
    one = chart(Panel("p", lines))
    assert len(one.fields["$norms"]) == len(one.fields["$colours"]) == 40
    assert one.svg.count("var(--") >= 40


@pytest.mark.parametrize("x", ["names", "log", "scale"])
@pytest.mark.parametrize(("log", "percent"), [(False, False), (True, False), (False, True), (True, True)])
def test_every_pair_of_axes_is_drawn(x, log, percent):
    panel = Panel("p", [Line("batch", [0.1, 1], [0.2, 0.4])], x_names=["a", "b"] * (x == "names"), x_log=x == "log")
    texts = ["".join(text.itertext()) for text in drawn(panel, log=log, percent=percent).iter(f"{SVG}text")]
    assert any(text.endswith("%") for text in texts) == percent
    if x == "names":
        assert {"a", "b"} <= set(texts)
    if x == "log":
        assert {"0.1", "1"} <= set(texts)


def test_words_for_who_cannot_see_it():
    panel = Panel("batch size 8", [Line("layer", [0, 1], [0.5, 0.934])])
    assert chart(panel, percent=True).words == "batch size 8; at the right end: layer 93.4%"


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (0.1234, "0.123"), (12345.0, "12,345"), (1e-7, "1e-7"), (2.5e8, "2.5e8")]
)
def test_numbers_are_printed_short(value, text):
    assert number(value) == text
    assert number(0.25, percent=True) == "25%"


def test_a_norm_has_one_colour_everywhere():
    assert colour("batch") == "var(--blue)"
    assert colour("mine") == colour("mine")


def test_the_script_cannot_end_its_element():
    assert "</script" not in library()
    assert "vegaEmbed" in library()


def test_an_effect_s_interval_and_minimum_are_where_they_belong():
    effect = Effect("x", 'point"s', 1.0, Measured({0: 2.0, 1: 3.0, 2: 4.0}), headroom="none")
    element = ElementTree.fromstring(effect_svg(effect))
    assert element.attrib["class"] == "effect undecided"
    assert 'point"s' in element.attrib["aria-label"]
    marks = [
        group for group in element.iter(f"{SVG}g") if group.attrib.get("class", "").split()[0:1] == ["mark-symbol"]
    ]
    seeds, mean = ([float(re.search(r"\(([-\d.]+)", mark.attrib["transform"])[1]) for mark in group] for group in marks)
    assert seeds[0] < seeds[1] == mean[0] < seeds[2]
    rules = [
        group for group in element.iter(f"{SVG}g") if group.attrib.get("class", "").startswith("mark-rule role-mark")
    ]
    zero, minimum, _ = (float(re.search(r"\(([-\d.]+)", group[0].attrib["transform"])[1]) for group in rules)
    assert zero < minimum < seeds[0]
    assert effect_svg(Effect("x", "points", 1.0, Measured({}), headroom="none")) == ""
    assert "<svg" in effect_svg(Effect("x", "points", 1.0, Measured({0: 1.0}), headroom="none"))  # one seed, no span


@pytest.mark.parametrize(("minimum", "told"), [(50, "50"), (0.05, "0.05"), (-0.25, "\u22120.25"), (1000, "1000")])
def test_the_smallest_effect_is_told_in_all_its_digits(minimum, told):
    effect = Effect("x", "points", minimum, Measured({0: 1.3 * minimum, 1: 1.2 * minimum}), headroom="none")
    assert f">{told}</text>" in effect_svg(effect)


def test_ticks_are_told_in_all_their_digits():
    svg = chart(Panel("p", [Line("batch", [0, 1], [0.0, 0.25])])).svg
    told = {float(text) for text in re.findall(r">([\d.]+)</text>", svg)}
    assert told >= {0.05, 0.1, 0.15, 0.2, 0.25}
