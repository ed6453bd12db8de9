"""The links of the pages that are read in the repository itself lead somewhere; those of docs/ are checked as a site,
by `make docs` and test_site.py."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from support.pages import ROOT, each_of

# ROOT/docs is left out, and what a test or a build leaves.
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("src/**/*.md"), *ROOT.glob("benchmarks/**/*.md")])


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$|`[^`\n]*`", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Those that GitHub makes of the headings, and those that a page sets itself."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    own = re.findall(r'<a id="([^"]+)"', text)
    return {*own, *(re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings)}


def broken_links(page: Path) -> list[str]:
    broken = []
    for url in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", url):
            continue
        path, _, anchor = url.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(url)
    return broken


@each_of(PAGES)
def test_links_lead_somewhere(page):
    assert broken_links(page) == []


@pytest.mark.parametrize(
    ("text", "broken"),
    [
        ("[a](gone.md)", ["gone.md"]),
        ("[a](#gone)", ["#gone"]),
        ("![a](page.md#gone)", ["page.md#gone"]),
        ("[a](https://example.org/x) [a](page.md) [a](#a-heading-of-code) `[a](gone.md)`", []),
        ("```\n[a](gone.md)\n```", []),
        ('[a](#set) [a](#other)\n\n## <a id="set"></a>Words', ["#other"]),
    ],
)
def test_a_planted_link_is_found(tmp_path, text, broken):
    page = tmp_path / "page.md"
    page.write_text(f"# A heading, of `code`\n\n{text}\n")
    assert broken_links(page) == broken
