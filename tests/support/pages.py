"""The pages of README.md and docs/: their blocks, and the libraries that those of a page need."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", ROOT / "README.zh.md", *sorted((ROOT / "docs").rglob("*.md"))]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def each_of(pages: list[Path]) -> pytest.MarkDecorator:
    """A test for each page, under the page's name."""
    return pytest.mark.parametrize("page", pages, ids=name_of)


def blocks(page: Path, *languages: str) -> list[tuple[int, str]]:
    """(line of the first line, text) of every fenced block in one of the languages."""
    text = page.read_text(encoding="utf-8")
    fenced = re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, m.start(2)) + 1, m[2]) for m in fenced if m[1] in languages]


def needed_by(page: Path) -> list[str]:
    """The libraries without which the page's blocks cannot run: `<!-- needs: timm -->` on its first line. Such a page
    runs in `suite_of(page)`."""
    found = re.match(r"<!-- needs: (.+?) -->\n", page.read_text(encoding="utf-8"))
    return found[1].split(", ") if found else []


def libraries_of(extra: str) -> list[str]:
    """What an extra of pyproject.toml brings."""
    (entries,) = re.findall(rf"^{extra} = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    return re.findall(r'"(\w+)', entries)


def suite_of(page: Path) -> str:
    """ "models" or "trainers": the folder of tests/ where the page runs, and the extra that it needs."""
    return "models" if set(needed_by(page)) <= set(libraries_of("models")) else "trainers"


def run_python_blocks(page: Path) -> None:
    """In one fresh namespace; a later block may use what an earlier one made."""
    namespace = {"__name__": "__snippet__"}
    for line, text in blocks(page, "python"):
        # Blank lines in front make a traceback point at the page's own line.
        # A block stands for itself: this file's own annotations are text, which a dataclass in a block would look up.
        exec(compile("\n" * (line - 1) + text, str(page), "exec", dont_inherit=True), namespace)
