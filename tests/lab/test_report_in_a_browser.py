"""The page as a reader meets it, in headless Chromium: nothing on the console and no request but the file itself."""

from __future__ import annotations

import pytest

from normwise.lab.claim import judge
from normwise.lab.claims import claims
from normwise.lab.report import write_report
from normwise.lab.score import score
from normwise.lab.spec import expand
from normwise.lab.store import Store
from normwise.lab.sweep import sweep
from normwise.lab.tasks import load_task
from support.browser import DESKTOP, PHONE, wider_than_the_screen
from support.made_up_runs import made_up


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Two tasks, two and three norms, and the verdicts of three claims."""
    specs = expand(
        "mlp", seeds=2, norms=["none", "batch", "layer"], batch_sizes=[16, 8], learning_rates=[0.1], steps=12
    )
    specs += expand("rnn", seeds=2, norms=["none", "batch-input"], batch_sizes=[8], learning_rates=[0.01], steps=3)
    folder = tmp_path_factory.mktemp("browser")
    with Store(folder / "runs.sqlite") as store:
        sweep(specs, store, jobs=1, finished=lambda *_: None)
        runs = store.runs(spec.key() for spec in specs)
    judged = [judge(claims()[name], (), 2) for name in ("identity", "padding")]
    shift = made_up(claims()["ics"], 2, lambda spec, draws: {"shift/gradient/a": [draws.random()]})
    judged.append(judge(claims()["ics"], shift, 2))
    tasks = {name: load_task(name).task for name in ("mlp", "rnn")}
    return write_report(score(runs), tasks, folder / "report.html", judged=judged)


SMALLEST_LETTERS = """panel => {
  const svg = panel.querySelector('svg'), scale = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
  const sizes = [...svg.querySelectorAll('text')].map(text => parseFloat(getComputedStyle(text).fontSize));
  return scale * Math.min(...sizes);
}"""
# The contrast of the faintest text and its ground, by WCAG's formula.
FAINTEST_TEXT = """panel => {
  const linear = (c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const light = (colour) => {
    const [r, g, b] = colour.match(/[\\d.]+/g).map(c => linear(c / 255));
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const ground = light(getComputedStyle(panel.closest('figure')).backgroundColor);
  return Math.min(...[...panel.querySelectorAll('svg text')].map(text => light(getComputedStyle(text).fill))
    .map(ink => (Math.max(ink, ground) + .05) / (Math.min(ink, ground) + .05)));
}"""


def visible(page, selector):
    return page.locator(f"{selector} >> visible=true").count()


def test_it_opens_with_the_claims_and_switches_to_a_task(open_page, report):
    page = open_page(report)
    assert page.locator("#claims").is_visible()
    assert not page.locator("#mlp").is_visible()
    page.get_by_role("tab", name="mlp", exact=True).click()
    assert page.locator("#mlp").is_visible()
    assert not page.locator("#claims").is_visible()
    assert page.url.endswith("#mlp")
    page.keyboard.press("ArrowRight")  # the tabs by keyboard
    assert page.locator("#rnn").is_visible()
    page.reload()
    assert page.locator("#mlp").is_visible()  # the address remembers what was clicked


def live(page, part):
    """The first panel of a part, when its chart is live; scrolled to where it is seen whole."""
    panel = page.locator(f"#{part} .panel").first
    panel.evaluate("panel => panel.scrollIntoView({block: 'center'})")
    page.wait_for_function("panel => panel.view", arg=panel.element_handle())
    return panel


def domain(panel, axis="x"):
    return panel.evaluate(f"panel => panel.view.scale('{axis}').domain()")


def test_hovering_shows_the_numbers_at_that_step(open_page, report):
    page = open_page(report)
    page.get_by_role("tab", name="mlp", exact=True).click()
    panel = live(page, "mlp")
    panel.hover()
    tip = page.locator("#tip").inner_text()
    assert tip.startswith("step ")
    assert all(norm in tip for norm in ("none", "batch", "layer"))
    assert panel.evaluate("panel => panel.view.data('at').length") == 1
    page.mouse.move(2, 2)
    assert page.locator("#tip").is_hidden()


def test_the_arrow_keys_do_the_same(open_page, report):
    page = open_page(report)
    page.get_by_role("tab", name="mlp", exact=True).click()
    panel = live(page, "mlp")
    panel.focus()
    page.keyboard.press("End")
    last = page.locator("#tip").inner_text()
    page.keyboard.press("ArrowLeft")
    before = page.locator("#tip").inner_text()
    assert last.startswith("step ")
    assert before.startswith("step ")
    assert before.split("\n")[0] != last.split("\n")[0]
    page.keyboard.press("Escape")
    assert page.locator("#tip").is_hidden()


def test_a_chart_is_zoomed_by_keys_and_by_the_wheel_with_shift_alone(open_page, report):
    page = open_page(report)
    page.get_by_role("tab", name="mlp", exact=True).click()
    panel = live(page, "mlp")
    whole = domain(panel)
    panel.focus()
    page.keyboard.press("+")
    low, high = domain(panel)
    assert high - low == pytest.approx((whole[1] - whole[0]) / 2)
    page.keyboard.press("0")
    assert domain(panel) == whole
    panel.hover()
    page.mouse.wheel(0, 100)
    page.wait_for_timeout(200)
    assert domain(panel) == whole  # the page has scrolled instead
    live(page, "mlp").hover()
    page.keyboard.down("Shift")
    page.mouse.wheel(0, -200)
    page.keyboard.up("Shift")
    page.wait_for_function(
        "([panel, whole]) => panel.view.scale('x').domain()[0] > whole", arg=[panel.element_handle(), whole[0]]
    )


@pytest.mark.parametrize(("kind", "start"), [("PNG", b"\x89PNG"), ("SVG", b"<svg"), ("data", b"panel,norm,curve,step")])
def test_the_keyboard_saves_a_figure(open_page, report, kind, start):
    page = open_page(report)
    page.get_by_role("tab", name="mlp", exact=True).click()
    figure = page.locator("#mlp figure").first
    figure.locator("summary").focus()
    page.keyboard.press("Enter")
    figure.get_by_role("button", name=kind).focus()
    with page.expect_download() as download:
        page.keyboard.press("Enter")
    data = download.value.path().read_bytes()
    assert download.value.suggested_filename == f"mlp-training-loss.{'csv' if kind == 'data' else kind.lower()}"
    assert data.startswith(start)
    if kind == "PNG":
        assert int.from_bytes(data[16:20], "big") > 1000  # two panels side by side, at twice the pixels
    if kind == "SVG":
        text = data.decode()
        assert "var(--" not in text
        assert all(word in text for word in (">Training loss<", ">batch size 16<", ">layer<"))
    if kind == "data":
        lines = data.decode().splitlines()
        assert len(lines) == 1 + 2 * 3 * 12  # batch sizes, norms, steps
        assert lines[1].startswith("batch size 16,none,,")


def test_a_saved_figure_of_one_norm_a_panel_keeps_their_colours(open_page, report):
    page = open_page(report)
    page.get_by_role("tab", name="mlp", exact=True).click()
    figure = page.locator("#mlp figure", has=page.get_by_role("heading", name="The input of one nonlinearity")).first
    figure.locator("summary").click()
    with page.expect_download() as download:
        figure.get_by_role("button", name="SVG").click()
    text = download.value.path().read_text(encoding="utf-8")
    assert all(colour in text for colour in ("#6e6e6e", "#0072b2", "#d55e00"))  # no norm, batch, layer


def test_the_heat_map_is_saved_too(open_page, report):
    page = open_page(report)
    page.get_by_role("tab", name="mlp", exact=True).click()
    card = page.locator("#mlp .card")
    for kind, part in (("SVG", "batch size"), ("data", "norm,batch size 16,batch size 8")):
        card.locator("details.save summary").click()
        with page.expect_download() as download:
            card.get_by_role("button", name=kind).click()
        assert part in download.value.path().read_text(encoding="utf-8")


def test_a_norm_is_filtered_from_figures_tables_and_tooltips(open_page, report):
    page = open_page(report)
    page.get_by_role("tab", name="mlp", exact=True).click()
    panel = live(page, "mlp")
    curves = "panel => [...new Set(panel.view.data('rows').map(row => row.norm))].sort()"
    assert panel.evaluate(curves) == ["batch", "layer", "none"]
    assert visible(page, ".filter.norms label") == 3  # those of this task alone
    page.get_by_label("batch", exact=True).uncheck()
    assert visible(page, "#mlp [data-norm=batch]") == 0
    assert panel.evaluate(curves) == ["layer", "none"]
    assert visible(page, "#mlp .panel[aria-label^='batch, batch size']") == 0  # it had nothing else
    assert visible(page, "#mlp .panel[aria-label^='layer, batch size']") == 2
    live(page, "mlp").hover()
    assert "batch" not in page.locator("#tip").inner_text()
    page.get_by_label("batch", exact=True).check()
    assert panel.evaluate(curves) == ["batch", "layer", "none"]


def test_claims_are_filtered_by_verdict_and_unfolded(open_page, report):
    page = open_page(report)
    assert visible(page, ".claim") == 3
    assert visible(page, ".filter.norms") == 0  # it has no norms to filter
    page.get_by_label("supported", exact=True).check()
    assert visible(page, ".claim") == 2
    page.get_by_label("undecided", exact=True).check()
    assert visible(page, ".claim") == 1
    page.locator(".claim summary >> visible=true").click()
    assert "Santurkar" in page.locator("#claim-ics").inner_text()


def test_one_layer_at_a_time(open_page, report):
    page = open_page(report)
    page.get_by_role("tab", name="mlp", exact=True).click()
    figure = page.locator("#mlp figure:has(select)").first
    shown = figure.locator(".panel >> visible=true")
    assert shown.count() == 2  # a batch size each
    first = shown.first.get_attribute("aria-label")
    figure.locator("select").select_option("2")
    assert shown.count() == 2
    assert shown.first.get_attribute("aria-label") != first


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_nothing_is_wider_than_the_screen_and_text_is_legible(open_page, report, viewport, scheme):
    page = open_page(report, viewport=viewport, color_scheme=scheme)
    for tab in page.get_by_role("tab").all():
        tab.click()
        assert wider_than_the_screen(page) == 0
        page.locator("details").evaluate_all("all => all.forEach(one => { one.open = true; })")
        assert wider_than_the_screen(page) == 0
    page.get_by_role("tab", name="mlp", exact=True).click()
    panel = live(page, "mlp")
    assert panel.evaluate(SMALLEST_LETTERS) > 9  # CSS pixels
    assert panel.evaluate(FAINTEST_TEXT) > 4.5  # of text and ground, as WCAG asks
    ground, ink = page.evaluate(
        "['--ground', '--ink'].map(name => getComputedStyle(document.documentElement).getPropertyValue(name))"
    )
    assert (ground < ink) == (scheme == "dark")


def test_print_and_a_browser_without_scripts_show_every_part(open_page, report):
    page = open_page(report)
    page.emulate_media(media="print")
    assert visible(page, "section[role=tabpanel]") == 4
    assert visible(page, ".bar") == 0
    charts = visible(page, ".panel > svg")
    page = open_page(report, java_script_enabled=False)
    assert visible(page, "section[role=tabpanel]") == 4
    assert visible(page, "[role=tab], .filter") == 0
    assert visible(page, ".save") == 0
    assert visible(page, ".panel > svg") == visible(page, ".panel") >= charts > 20  # drawn before any script runs
