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


def test_hovering_shows_the_numbers_at_that_step(open_page, report):
    page = open_page(report)
    page.get_by_role("tab", name="mlp", exact=True).click()
    page.locator("#mlp svg.panel").first.hover()
    tip = page.locator("#tip").inner_text()
    assert tip.startswith("step ")
    assert all(norm in tip for norm in ("none", "batch", "layer"))
    assert page.locator(".guide.on").count() == 1
    page.locator("h1").hover()
    assert page.locator("#tip").is_hidden()


def test_the_arrow_keys_do_the_same(open_page, report):
    page = open_page(report)
    page.get_by_role("tab", name="mlp", exact=True).click()
    panel = page.locator("#mlp svg.panel").first
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


def test_a_norm_is_filtered_from_figures_tables_and_tooltips(open_page, report):
    page = open_page(report)
    page.get_by_role("tab", name="mlp", exact=True).click()
    assert visible(page, "#mlp g[data-norm=batch]") > 0
    assert visible(page, ".filter.norms label") == 3  # those of this task alone
    page.get_by_label("batch", exact=True).uncheck()
    assert visible(page, "#mlp [data-norm=batch]") == 0
    assert visible(page, "#mlp g[data-norm=layer]") > 0
    page.locator("#mlp svg.panel").first.hover()
    assert "batch" not in page.locator("#tip").inner_text()
    page.get_by_label("batch", exact=True).check()
    assert visible(page, "#mlp g[data-norm=batch]") > 0


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
    shown = figure.locator("svg.panel >> visible=true")
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
    sizes = page.locator("#mlp svg.panel").first.evaluate("panel => panel.getBoundingClientRect().width / 340 * 11")
    page.get_by_role("tab", name="mlp", exact=True).click()
    sizes = page.locator("#mlp svg.panel").first.evaluate("panel => panel.getBoundingClientRect().width / 340 * 11")
    assert sizes > 9  # CSS pixels of the smallest letters
    ground, ink = page.evaluate(
        "['--ground', '--ink'].map(name => getComputedStyle(document.documentElement).getPropertyValue(name))"
    )
    assert (ground < ink) == (scheme == "dark")


def test_print_and_a_browser_without_scripts_show_every_part(open_page, report):
    page = open_page(report)
    page.emulate_media(media="print")
    assert visible(page, "section[role=tabpanel]") == 4
    assert visible(page, ".bar") == 0
    page = open_page(report, java_script_enabled=False)
    assert visible(page, "section[role=tabpanel]") == 4
    assert visible(page, "[role=tab], .filter") == 0
