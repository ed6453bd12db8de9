"""The site that `make docs` builds: complete, nothing asked of another machine, and its search finds things."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from scripts.check_site import faults_of_nav, faults_of_site
from support.browser import PHONE, wider_than_the_screen
from support.pages import ROOT

API = [(p.stem, re.findall(r"^::: (\S+)", p.read_text(), re.MULTILINE)) for p in sorted(ROOT.glob("docs/api/*.md"))]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as `make docs` does, of a copy: Zensical writes beside its settings."""
    pytest.importorskip("zensical", reason="pip install zensical (extra 'docs', Python 3.11) builds the site")
    root = tmp_path_factory.mktemp("site")
    for name in ("docs", "docs-theme", "src/normwise"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "data"))
    shutil.copy(ROOT / "zensical.toml", root)
    command = [sys.executable, "-m", "zensical", "build", "--clean", "--strict"]
    built = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=280)
    said = built.stdout + built.stderr
    assert built.returncode == 0, said
    # Of a docstring that is not as Google's, mkdocstrings leaves a sentence out and says so.
    assert "griffe" not in said, said
    return root / "site"


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    """Where a server gives the site away."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def visit(browser: Any, request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    """`visit(page, served=True, ...)` opens a page of the site; the test fails on whatever a page says on the console,
    and on a request that leaves the site."""
    site, contexts, faults = request.getfixturevalue("site"), [], []

    def open_(page: str, *, served: bool, **context: Any) -> Any:
        base = request.getfixturevalue("address") if served else site.as_uri()
        contexts.append(browser.new_context(**context))
        opened = contexts[-1].new_page()
        opened.set_default_timeout(120_000)  # the search reads all pages first, and the processors may be taken
        opened.on("pageerror", lambda error: faults.append(f"error: {error}"))
        # Chromium tells as information that a page with an anchor does not begin in its search box.
        opened.on("console", lambda said: said.type == "info" or faults.append(f"console {said.type}: {said.text}"))
        opened.on("request", lambda asked: asked.url.startswith((base, "data:")) or faults.append(asked.url))
        opened.goto(f"{base}/{page}")
        return opened

    yield open_
    for context in contexts:
        context.close()
    assert faults == []


def test_the_site_is_whole(site):
    assert list(faults_of_site(site)) == []


def test_nav_has_every_page_once():
    assert list(faults_of_nav(ROOT)) == []


@pytest.mark.parametrize(("page", "names"), API, ids=[page for page, _ in API])
def test_a_reference_page_shows_what_it_names(site, page, names):
    text = (site / "api" / f"{page}.html").read_text(encoding="utf-8")
    assert [name for name in names if f'id="{name}"' not in text] == []
    functions = [name for name in names if name.rpartition(".")[2][0].islower()]
    assert text.count('class="doc-signature') >= len(functions)


def test_a_page_says_which_language_it_is_in(site):
    def language(page: Path) -> str:
        return re.search(r'<html lang="(\w+)"', page.read_text(encoding="utf-8"))[1]

    assert language(site / "index.html") == "en"
    assert {language(page) for page in site.glob("zh/**/*.html")} == {"zh"}


@pytest.mark.parametrize("served", [True, False], ids=["from-a-server", "from-the-disk"])
@pytest.mark.parametrize(
    ("word", "expected"),
    [("masked", "layers"), ("层归一化", "zh/"), ("RMSNorm", "api/layers")],
    ids=["en", "zh", "name"],
)
def test_the_search_finds_a_page(visit, word, expected, served):
    page = visit("index.html", served=served)
    page.locator(".md-search__button").click()
    page.keyboard.type(word)
    found = page.get_by_role("dialog").locator(f"a[href*='{expected}']").first
    found.click()
    page.wait_for_url(f"**/{expected}*")
    assert word.lower() in page.locator("article").inner_text().lower()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["index.html", "claims.html", "diagnose.html", "api/layers.html", "zh/tutorial.html"])
def test_a_page_fits_a_phone(visit, name, scheme):
    page = visit(name, served=False, viewport=PHONE, color_scheme=scheme)
    assert wider_than_the_screen(page) <= 0
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ("<a href='gone.html'>a</a>", "a.html:1: gone.html: no such file"),
        ("<a href='b.html#gone'>a</a>", "a.html:1: b.html#gone: the page has no such anchor"),
        ("<a href='#gone'>a</a>", "a.html:1: #gone: the page has no such anchor"),
        ("<a href='folder/'>a</a>", "a.html:1: folder/: a folder: name the page in it"),
        ("<a href='../pyproject.toml'>a</a>", "a.html:1: ../pyproject.toml: outside of the site"),
        ("<img src='gone.png'>", "a.html:1: gone.png: no such file"),
        ("<img srcset='b.html, gone.png 2x'>", "a.html:1: gone.png: no such file"),
        ("<style>p { background: url(gone.png) }</style>", "a.html:1: gone.png: no such file"),
        ("<p style='background: url(\"gone.png\")'>", "a.html:1: gone.png: no such file"),
        ("<script src='https://example.org/a.js'></script>", "a.html:1: https://example.org/a.js: asked of another"),
        ("<link rel='stylesheet' href='//example.org/a'>", "a.html:1: //example.org/a: asked of another"),
        ("<link rel='stylesheet' href='bad.css'>", "bad.css: https://example.org/font: asked of another"),
    ],
)
def test_a_planted_fault_is_found(tmp_path, body, fault):
    (tmp_path / "folder").mkdir()
    (tmp_path / "b.html").write_text("<h1 id=here>b</h1>")
    if "bad.css" in body:
        (tmp_path / "bad.css").write_text("@font-face { src: url('https://example.org/font') }")
    (tmp_path / "a.html").write_text(body)
    (found,) = faults_of_site(tmp_path)
    assert found.startswith(fault)


def test_what_is_right_is_let_pass(tmp_path):
    (tmp_path / "b.html").write_text(
        "<h1 id='a b'>b</h1><a href='https://example.org/'>a</a><a href='mailto:a@example.org'>a</a>"
        "<a href=''>a</a><a href='#'>a</a><img src='data:image/png;base64,'><a href='b.html#a%20b'>a</a>"
    )
    (tmp_path / "404.html").write_text("<a href='/'>a</a><a href='/b.html'>a</a>")
    assert list(faults_of_site(tmp_path)) == []


def test_planted_faults_of_nav_are_found(tmp_path):
    (tmp_path / "docs").mkdir()
    for name in ("index", "outside", "twice"):
        (tmp_path / "docs" / f"{name}.md").write_text("# Page\n")
    (tmp_path / "zensical.toml").write_text(
        '[project]\nnav = ["index.md", {"A" = "gone.md"}, {"B" = [{"C" = "twice.md"}, "twice.md"]}]\n'
    )
    assert list(faults_of_nav(tmp_path)) == [
        "zensical.toml: nav: gone.md: no such page below docs/",
        "docs/outside.md: not in nav of zensical.toml",
        "zensical.toml: nav: twice.md: named twice",
    ]


def test_a_broken_link_and_a_broken_anchor_stop_the_build(tmp_path):
    pytest.importorskip("zensical", reason="pip install zensical (extra 'docs', Python 3.11) builds the site")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# Page\n\n[a](gone.md) [b](#gone)\n")
    (tmp_path / "zensical.toml").write_text('[project]\nsite_name = "a"\nnav = ["index.md"]\n')
    command = [sys.executable, "-m", "zensical", "build", "--clean", "--strict"]
    built = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert built.returncode != 0
    assert "page does not exist" in built.stderr + built.stdout
    assert "anchor does not exist" in built.stderr + built.stdout
