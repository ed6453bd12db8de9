"""The page as a reader meets it: in a browser, with the network off."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import normwise
from normwise.diagnosis.page import page, write_page
from support.browser import PHONE

sys.path.insert(0, str(Path(__file__).parent))
from support.faults import FAULTS


class Tagger(nn.Module):
    """An LSTM whose name of a layer holds what HTML would take for markup."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 16, batch_first=True)
        self.add_module("</script><b>head", nn.Linear(16, 4))
        self.norm = nn.BatchNorm1d(4, momentum=0.99)

    def forward(self, x):
        return self.norm(self.get_submodule("</script><b>head")(self.lstm(x)[0][:, -1]))


@pytest.fixture(scope="module")
def found():
    torch.manual_seed(0)
    model = Tagger()
    batches = [(torch.randn(32, 12, 6), torch.randint(4, (32,))) for _ in range(3)]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    return normwise.diagnose(model, batches, loss=nn.functional.cross_entropy, optimizer=optimizer, use_pyproject=False)


@pytest.fixture(scope="module")
def written(found, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "deep" / "diagnosis.html"
    write_page(found, path)
    return path


def test_findings_are_there_and_lead_to_their_layer(written, open_page, found):
    shown = open_page(written)
    codes = shown.locator(".findings .head b").all_inner_texts()
    assert codes == [group.code for group in found.groups]
    assert "NW006" in codes
    shown.locator(".finding", has_text="NW006").get_by_role("link").click()
    assert shown.locator("article h3.name").inner_text() == "norm"
    assert "BatchNorm1d" in shown.locator("article dl").inner_text()


def test_clicking_a_layer_shows_its_numbers(written, open_page, found):
    shown = open_page(written)
    shown.locator("nav").get_by_role("link", name="lstm").click()
    article = shown.locator("article")
    assert article.locator("h3.name").inner_text() == "lstm"
    titles = article.locator("figure h3").all_inner_texts()
    assert {"Input", "Output", "Saturated gates, l0", "Size over time, l0", "Gradient over time, l0"} <= set(titles)
    # One line for each gate, as long as the sequences.
    gates = article.locator("figure", has_text="Saturated gates").locator("path")
    assert gates.count() == 4
    assert len(re.findall("[ML]", gates.first.get_attribute("d"))) == 12
    assert shown.locator("nav a[aria-current]").inner_text().startswith("lstm")


def test_a_bar_of_the_overview_is_a_link(written, open_page, found):
    shown = open_page(written)
    bars = shown.locator("#charts figure", has_text="Gradient by depth").locator("a")
    assert bars.count() == sum(layer.gradient is not None for layer in found.layers)
    bars.last.focus()
    shown.keyboard.press("Enter")
    assert shown.locator("article h3.name").inner_text() == "norm"


def test_a_finding_of_a_block_leads_to_its_first_layer_and_streams_and_attention_are_drawn(open_page, tmp_path):
    torch.manual_seed(0)
    found = normwise.diagnose(**FAULTS["NW018"](True), use_pyproject=False)
    (finding,) = [f for f in found.findings if f.code == "NW018"]
    write_page(found, tmp_path / "transformer.html")
    shown = open_page(tmp_path / "transformer.html")
    shown.locator(".finding", has_text="NW018").first.get_by_role("link").click()
    assert finding.layer == "blocks.0"
    assert shown.locator("article h3.name").inner_text() == "blocks.0.norm1"
    assert "NW018" in shown.locator("article .finding").first.inner_text()
    for title, count in (("Residual stream", 4), ("Outlier features", 4), ("Attention logits", 4)):
        bars = shown.locator("#charts figure", has=shown.get_by_role("heading", name=title)).locator("a")
        assert bars.count() == count
    shown.locator("#charts figure", has_text="Residual stream").locator("a").last.focus()
    shown.keyboard.press("Enter")
    assert shown.locator("article h3.name").inner_text() == "blocks.3.norm1"
    assert "NW018" not in shown.locator("article").inner_text()


def test_markup_in_a_name_stays_text(written, open_page):
    shown = open_page(written)
    shown.locator("nav").get_by_role("link", name="head").click()
    assert shown.locator("article h3.name").inner_text() == "</script><b>head"


def test_a_phone_shows_it_without_scrolling_sideways(written, open_page):
    shown = open_page(written, viewport=PHONE, color_scheme="dark")
    assert shown.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]


def test_the_page_carries_the_diagnosis(found):
    html = page(found)
    assert len(html) < 3e6
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)[1]
    assert normwise.Diagnosis.from_dict(json.loads(data)) == found


def test_a_page_that_cannot_be_written_leaves_the_old_one(found, written, monkeypatch):
    before = written.read_text(encoding="utf-8")
    monkeypatch.setattr("normwise.diagnosis.page.page", lambda diagnosis: "\ud800")
    with pytest.raises(UnicodeEncodeError):
        write_page(found, written)
    assert written.read_text(encoding="utf-8") == before


@pytest.fixture(scope="module")
def many():
    torch.manual_seed(0)
    layers = [k for _ in range(53) for k in (nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU())]
    batches = [(torch.randn(2, 8), torch.randint(8, (2,)))] * 2
    return normwise.diagnose(nn.Sequential(*layers), batches, loss=nn.functional.cross_entropy, use_pyproject=False)


def test_many_findings_of_a_code_are_folded_away(many, open_page, tmp_path):
    write_page(many, tmp_path / "many.html")
    shown = open_page(tmp_path / "many.html", viewport=PHONE)
    assert shown.locator(".findings > li").count() == len(many.groups)
    entry = shown.locator(".findings > li", has_text="NW001")
    assert "53 layers: batch statistics from very few values" in entry.inner_text()
    assert entry.locator("li").count() == 53
    assert not entry.locator("li").first.is_visible()
    height = "document.querySelector('.findings').getBoundingClientRect().height"
    folded = shown.evaluate(height)
    assert folded < 3 * PHONE["height"]
    entry.locator("summary").click()
    assert shown.evaluate(height) > folded
    entry.locator("li").nth(2).get_by_role("link").click()
    assert shown.locator("article h3.name").inner_text() == "7"
    assert shown.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]


def test_a_notebook_shows_the_page(found, open_page, tmp_path):
    """As the value of a cell, in a frame that a script in it cannot leave."""
    cell = found._repr_html_()
    (tmp_path / "notebook.html").write_text(f"<!doctype html><body>{cell}</body>", encoding="utf-8")
    shown = open_page(tmp_path / "notebook.html")
    inside = shown.frame_locator("iframe")
    assert inside.locator("h1").inner_text() == "What normalization does in Tagger"
    inside.locator("nav").get_by_role("link", name="norm").click()
    assert inside.locator("article h3.name").inner_text() == "norm"


def test_a_notebook_without_jinja2_shows_the_table(found, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    cell = found._repr_html_()
    assert "NW006 warning" in cell
    assert "&lt;/script&gt;&lt;b&gt;head" in cell
    assert "pip install" in cell


def test_a_path_may_be_a_string(found, tmp_path):
    write_page(found, f"{tmp_path}/of/words.html")
    assert (tmp_path / "of" / "words.html").read_text("utf-8") == page(found)
