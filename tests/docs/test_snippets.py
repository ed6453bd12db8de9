"""The blocks of README.md and docs/ are true: Python runs, shown output is printed, named options exist."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest

from normwise.cli.app import app
from normwise.cli.main import main

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", ROOT / "README.zh.md", *sorted((ROOT / "docs").rglob("*.md"))]
GROUPS = {group.name for group in app.registered_groups}
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(page: Path, *languages: str) -> list[tuple[int, str]]:
    """(line of the first line, text) of every fenced block in one of the languages."""
    text = page.read_text(encoding="utf-8")
    fenced = re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, m.start(2)) + 1, m[2]) for m in fenced if m[1] in languages]


def output_of(arguments: list[str]) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0
    return out.getvalue()


@each_page
def test_python_blocks_run(page):
    """In one fresh namespace a page; a later block may use what an earlier one made."""
    namespace = {"__name__": "__snippet__"}
    for line, text in blocks(page, "python"):
        # Blank lines in front make a traceback point at the page's own line.
        exec(compile("\n" * (line - 1) + text, str(page), "exec"), namespace)


@each_page
def test_shown_output_is_what_the_command_prints(page):
    """`$ normwise ...` and its output, line by line; `...` stands for lines left out."""
    for _, text in blocks(page, "console"):
        command, _, shown = text.partition("\n")
        assert command.startswith("$ normwise ")
        printed = output_of(shlex.split(command)[2:])
        for part in re.split(r"^\.\.\.\n", shown, flags=re.MULTILINE):
            assert part in printed
            printed = printed.partition(part)[2]


@each_page
def test_commands_and_options_exist(page):
    for _, text in blocks(page, "sh"):
        for line in text.splitlines():
            words = shlex.split(line, comments=True)
            if "normwise" not in words:
                continue
            rest = words[words.index("normwise") + 1 :]
            # A command may have commands of its own, as in `normwise runs list`.
            depth = 2 if rest[0] in GROUPS else 1
            command = " ".join(rest[:depth])
            usage = output_of([*rest[:depth], "--help"])
            for option in (word.partition("=")[0] for word in rest if word.startswith("--")):
                assert re.search(rf"\s{option}\b", usage), f"{page.name}: normwise {command} has no {option}"


def test_there_is_something_to_test():
    """The patterns above find the blocks that the pages have."""
    assert len(blocks(ROOT / "docs" / "layers.md", "python")) >= 8
    assert len(blocks(ROOT / "docs" / "cli.md", "console")) >= 1
    assert len(blocks(ROOT / "docs" / "cli.md", "sh")) >= 2


def test_contributing_names_files_that_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:src|tests|csrc|docs|scripts|benchmarks|examples)/[\w./-]*)`", text))
    assert len(named) > 20
    wanted = [path for path in named if "NAME" not in path]
    assert [path for path in wanted if not (ROOT / path).exists()] == []
