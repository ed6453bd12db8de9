"""The blocks of README.md and docs/ are true: Python runs, shown output is printed, named options exist."""

from __future__ import annotations

import contextlib
import io
import re
import shlex

import pytest

from normwise.cli.app import app
from normwise.cli.main import main
from support.pages import (
    PAGES,
    ROOT,
    blocks,
    each_of,
    libraries_of,
    name_of,
    needed_by,
    run_python_blocks,
    suite_of,
)

GROUPS = {group.name for group in app.registered_groups}
each_page = each_of(PAGES)


def output_of(arguments: list[str]) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0
    return out.getvalue()


@each_page
def test_python_blocks_run(page):
    if libraries := needed_by(page):
        suite = suite_of(page)
        pytest.skip(f"needs {', '.join(libraries)}: runs in tests/{suite}/ (make test-{suite})")
    run_python_blocks(page)


@each_of([page for page in PAGES if needed_by(page)])
def test_a_page_that_needs_libraries_is_about_them(page):
    """A needless mark, or one with a slip of the pen, would leave a page's blocks out of this suite for nothing."""
    extra = libraries_of(suite_of(page))
    code = "\n".join(text for _, text in blocks(page, "python"))
    for library in needed_by(page):
        assert library in extra
        assert re.search(rf"^(import|from) {library}\b", code, re.MULTILINE), f"{name_of(page)} never imports {library}"


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
