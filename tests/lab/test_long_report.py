"""The page of a store that has the runs of every claim: few tabs, a file of bearable size, and nothing lost."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from normwise.lab.claim import judge
from normwise.lab.claims import claims
from normwise.lab.figures import IN_BRIEF
from normwise.lab.report import MOST_TABS, in_brief, section, write_report
from normwise.lab.score import score
from normwise.lab.tasks import CLAIM_TASKS, TASKS, VARIANTS, load_task
from support.browser import DESKTOP, PHONE, wider_than_the_screen
from support.runs_of_all_claims import runs_of_all_claims

SEEDS = 2
COMPARED = ["mlp", "cnn", "rnn", "lstm", "charlm-transformer"]
LONGEST = 4e6  # bytes


@pytest.fixture(scope="module")
def rows():
    """Of lengths that ``study`` would draw: of two at one batch size, the longer."""
    runs = runs_of_all_claims(SEEDS)
    longest = {}
    for run in runs:
        one = run.identity
        cell = one["task"], one["batch_size"]
        longest[cell] = max(longest.get(cell, 0), one["steps"])
    drawn = [r for r in runs if r.identity["steps"] == longest[r.identity["task"], r.identity["batch_size"]]]
    return score(sorted(drawn, key=lambda run: [*TASKS, *CLAIM_TASKS].index(run.identity["task"])))


@pytest.fixture(scope="module")
def tasks(rows):
    return {name: load_task(name).task for name in dict.fromkeys(row.task for row in rows)}


@pytest.fixture(scope="module")
def path(rows, tasks, tmp_path_factory):
    runs = [run for row in rows for run in row.runs]
    of_runs = [claim for claim in claims().values() if claim.checks is None]  # the others take their time to compute
    judged = [judge(claim, runs, SEEDS) for claim in of_runs]
    return write_report(rows, tasks, tmp_path_factory.mktemp("long") / "report.html", judged=judged)


@pytest.fixture(scope="module")
def page(path):
    return path.read_text(encoding="utf-8")


def test_it_has_few_tabs_and_is_not_too_large(path, page, tasks):
    assert len(tasks) > 30
    assert re.findall(r'id="tab-([\w-]+)"', page) == ["claims", *COMPARED, "more", "rules"]
    assert path.stat().st_size < LONGEST


def test_every_task_is_there_once_and_says_what_is_not_drawn(page, rows, tasks, path):
    for name in tasks:
        assert page.count(f' id="{name}"') == 1
    parts = {part.partition('"')[0]: part for part in page.split('<details class="task" id="')[1:]}
    assert parts.keys() == tasks.keys() - set(COMPARED)
    for name, part in parts.items():
        assert f"normwise report --out {path.parent} --task {name}</code>" in part
        of_task = [row for row in rows if row.task == name]
        whole, brief = (section(name, None, of_task, brief=short) for short in (False, True))
        assert set(brief.left_out) | set(IN_BRIEF) >= {figure.title for figure in whole.figures}
        assert all(title in part for title in brief.left_out)
        assert [figure.title for figure in brief.figures] == list(IN_BRIEF)
        assert brief.cells.keys() == whole.cells.keys()


def test_tasks_share_a_tab_only_where_there_would_be_too_many():
    some = [*COMPARED[:2], *list(CLAIM_TASKS)[: MOST_TABS - 4]]
    assert in_brief(some, with_claims=True) == set()
    assert in_brief([*some, "mine"], with_claims=False) == set()
    assert in_brief([*some, "mine"], with_claims=True) == set(some) & CLAIM_TASKS.keys()
    assert in_brief([*TASKS, "mine", "bn-mnist"], with_claims=True) == set(VARIANTS)


def test_the_page_opens_on_a_task_of_ones_own(rows, tasks, tmp_path):
    own = [replace(row, task="mine") for row in rows if row.task == "lstm"]
    few = [row for row in rows if row.task in CLAIM_TASKS and row.batch_size == 64]
    some = dict.fromkeys([*(row.task for row in [*few, *own]), *list(CLAIM_TASKS)[:9]])
    page = write_report([*few, *own], some, tmp_path / "report.html").read_text(encoding="utf-8")
    assert re.findall(r'id="tab-([\w-]+)"', page) == ["mine", "more", "rules"]


def test_tasks_are_unfolded_by_keyboard_and_by_address(open_page, path):
    page = open_page(path)
    page.get_by_role("tab", name="more tasks").click()
    assert page.locator(".task[open]").count() == 0
    assert page.locator(".filter.norms").is_hidden()
    page.keyboard.press("Tab")  # from the tab to the first task
    page.keyboard.press("Enter")
    first = page.locator(".task").first
    assert first.get_attribute("id") == "mlp-bad-start"
    assert first.locator(".panel").first.is_visible()
    labels = page.locator(".filter.norms label >> visible=true").all_inner_texts()
    assert [label.strip() for label in labels] == ["none", "batch"]
    page.keyboard.press("Tab")  # to the claims that its runs decide
    page.keyboard.press("Enter")
    assert page.locator("#claims").is_visible()
    assert page.locator("#claim-faster").get_attribute("open") is not None
    page.go_back()
    page.goto(f"{path.absolute().as_uri()}#deep-mlp")
    assert page.locator("#more").is_visible()
    assert page.locator("#deep-mlp .panel").first.is_visible()
    bar, heading = (page.locator(one).bounding_box() for one in (".bar", "#deep-mlp h3 >> nth=0"))
    assert bar["y"] + bar["height"] <= heading["y"]  # what was asked for is not behind the bar


def test_a_figure_of_such_a_task_is_saved_under_its_name(open_page, path):
    page = open_page(path)
    page.goto(f"{path.absolute().as_uri()}#smooth")
    page.locator("#smooth figure details.save summary").first.click()
    with page.expect_download() as download:
        page.locator("#smooth figure").first.get_by_role("button", name="data").click()
    assert download.value.suggested_filename == "smooth-training-loss.csv"
    assert len(download.value.path().read_text(encoding="utf-8").splitlines()) > 10


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_nothing_is_wider_than_the_screen(open_page, path, viewport):
    page = open_page(path, viewport=viewport)
    page.get_by_role("tab", name="more tasks").click()
    assert wider_than_the_screen(page) == 0
    page.locator(".task").evaluate_all("all => all.forEach(one => { one.open = true; })")
    assert wider_than_the_screen(page) == 0


def test_print_unfolds_all_tasks_and_scripts_are_not_needed(open_page, path):
    page = open_page(path)
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator(".task:not([open])").count() == 0
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator(".task[open]").count() == 0
    page = open_page(path, java_script_enabled=False)
    page.locator("#smooth > summary").click()
    assert page.locator("#smooth .panel > svg").first.is_visible()
