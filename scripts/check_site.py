"""What `zensical build --strict` lets pass; `python scripts/check_site.py` after it, as in `make docs`, fails on each.

- A link, image, script or style of a built page that is no file of the site, or a folder (opened from the disk it would
  be a listing); an anchor that its page lacks.
- A script, style, image or font that another machine would be asked for. Links may lead anywhere.
- An entry of nav in zensical.toml without a page below docs/, a page without an entry, and one with two.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # of Zensical's own

ROOT = Path(__file__).parent.parent
ADDRESSES = ("href", "src", "srcset", "poster", "data", "xlink:href")


class Reference(NamedTuple):
    """What a page names: by a link that the reader may follow, or as a part of the page itself."""

    url: str
    line: int
    is_link: bool


class Page(HTMLParser):
    """The ids and references of one built page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.references: list[Reference] = []
        self._in_style = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.ids |= {given[name] for name in ("id", "name") if name == "id" or tag == "a" if name in given}
        self._in_style = tag == "style"
        for name in ADDRESSES:
            if name in given:
                urls = [part.split()[0] for part in given[name].split(",")] if name == "srcset" else [given[name]]
                # <use href> of an SVG and <link rel=stylesheet> are parts of the page; <link rel=next> is a link.
                is_link = tag in ("a", "area") or given.get("rel") in ("next", "prev", "canonical", "alternate")
                self.references += [Reference(url, self.getpos()[0], is_link) for url in urls]
        self.references += [Reference(url, self.getpos()[0], False) for url in in_css(given.get("style", ""))]

    def handle_endtag(self, tag: str) -> None:
        self._in_style = False

    def handle_data(self, data: str) -> None:
        if self._in_style:
            self.references += [Reference(url, self.getpos()[0], False) for url in in_css(data)]


def in_css(text: str) -> list[str]:
    """The addresses of a stylesheet."""
    found = re.findall(r"""url\(\s*(?:"([^"]*)"|'([^']*)'|([^)"']*?))\s*\)|@import\s+["']([^"']*)""", text)
    return [next(filter(None, groups)) for groups in found if any(groups)]


def faults_of_site(site: Path) -> Iterator[str]:
    """One line for each fault of the files below `site`."""
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    if not pages:
        yield f"{site}: no page; build it with `make docs`"
    for path, page in pages.items():
        for reference in page.references:
            if fault := _fault(site, path, reference, pages):
                yield f"{path.relative_to(site)}:{reference.line}: {reference.url}: {fault}"
    for path in sorted(site.rglob("*.css")):
        for url in in_css(path.read_text(encoding="utf-8")):
            if fault := _fault(site, path, Reference(url, 0, False), pages):
                yield f"{path.relative_to(site)}: {url}: {fault}"


def _fault(site: Path, origin: Path, reference: Reference, pages: dict[Path, Page]) -> str | None:
    parts = urlsplit(reference.url)
    if parts.scheme or parts.netloc:
        asks = not reference.is_link and parts.scheme not in ("data", "blob")
        return "asked of another machine when the page is opened" if asks else None
    target = origin
    if parts.path:
        # 404.html is shown for any address, so what it names starts at the root of the site.
        base = site if parts.path.startswith("/") else origin.parent
        target = (base / unquote(parts.path).lstrip("/")).resolve()
    if not target.is_relative_to(site):
        return "outside of the site"
    if target.is_dir():
        # The name of the site in the header of 404.html is a link to the root.
        return None if parts.path == "/" else "a folder: name the page in it"
    if not target.is_file():
        return "no such file"
    anchor = unquote(parts.fragment)
    if anchor and target in pages and anchor not in pages[target].ids:
        return "the page has no such anchor"
    return None


def faults_of_nav(root: Path) -> Iterator[str]:
    """One line for each page that is named in nav and not below docs/, or the reverse."""
    nav = tomllib.loads((root / "zensical.toml").read_text(encoding="utf-8"))["project"]["nav"]
    named = Counter(_named(nav))
    pages = {str(path.relative_to(root / "docs")) for path in (root / "docs").rglob("*.md")}
    for name in sorted(named.keys() - pages):
        yield f"zensical.toml: nav: {name}: no such page below docs/"
    for name in sorted(pages - named.keys()):
        yield f"docs/{name}: not in nav of zensical.toml"
    for name in sorted(name for name, times in named.items() if times > 1):
        yield f"zensical.toml: nav: {name}: named twice"


def _named(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    else:
        for entry in nav.values() if isinstance(nav, dict) else nav:
            yield from _named(entry)


def main() -> None:
    faults = [*faults_of_nav(ROOT), *faults_of_site(ROOT / "site")]
    sys.exit("\n".join([*faults, f"{len(faults)} faults"]) if faults else 0)


if __name__ == "__main__":
    main()
