"""A Chinese page says what its English page says: block for block the same code, figures, names, tables and links.

Both are cut into blocks (heading, paragraph, list, table, code) and compared in order, so that whoever changes a
figure, a row, a name or a line of code in one language is told of the other. Words are not compared.
"""

from __future__ import annotations

import ast
import calendar
import re
import shlex
import unicodedata
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from support.pages import ROOT, each_of, name_of

ZH = ROOT / "docs" / "zh"
INDEX = ZH / "index.md"
CHINESE = [ROOT / "README.zh.md", *(page for page in sorted(ZH.rglob("*.md")) if page != INDEX)]
MONTHS = [calendar.month_name[month] for month in range(1, 13)]
DATE = re.compile(rf"(\d+) ({'|'.join(MONTHS)}) (\d{{4}})")
FIGURE = re.compile(r"(?<![A-Za-z0-9_.])-?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?")
LINK = re.compile(r"(?:\]\(|<img src=\")([^)\s\"]+)[)\"]")
CODE = re.compile(r"(`+)(.+?)\1", re.DOTALL)

each_chinese_page = each_of(CHINESE)


def english_of(page: Path) -> Path:
    """The page that a Chinese page translates."""
    if page == ROOT / "README.zh.md":
        return ROOT / "README.md"
    if page == ZH / "tutorial.md":
        return ROOT / "docs" / "tutorial" / "index.md"
    return ROOT / "docs" / page.relative_to(ZH)


def slug(heading: str) -> str:
    """The id that Python-Markdown's toc and GitHub give a heading."""
    bare = re.sub(r"[^\w\s-]", "", re.sub(r"<[^>]+>", "", heading)).strip().lower()
    return re.sub(r"[-\s]+", "-", bare)


@cache
def blocks_of(text: str) -> list[tuple[int, str]]:
    """(line, text) of each block: what stands between blank lines, or between fences."""
    out: list[tuple[int, list[str]]] = []
    fenced = open_ = False
    for number, line in enumerate(text.splitlines(), 1):
        starts = line.startswith("```") and not fenced
        if starts or (open_ is False and line.strip()):
            out.append((number, []))
            open_ = True
        if fenced or line.strip():
            out[-1][1].append(line)
        if line.startswith("```"):
            fenced = not fenced
            open_ = fenced
        elif not fenced and not line.strip():
            open_ = False
    return [(number, "\n".join(lines)) for number, lines in out]


@cache
def kind(block: str) -> str:
    """The kind of a block, with what of its shape has to agree: level, language, items, cells of each row."""
    if heading := re.match(r"#+ ", block):
        return f"heading {heading[0].strip()}"
    if block.startswith("```"):
        return f"code {block.splitlines()[0]}"
    if block.startswith("    "):
        return f"formula of {len(block.splitlines())} lines"
    if block.startswith("|"):
        cells = [len(re.split(r"(?<!\\)\|", row)) - 2 for row in block.splitlines()]
        return f"table of {cells} cells"
    if re.match(r"- |\d+\. ", block):
        return f"list of {len(re.findall(r'^(?:- |[0-9]+[.] )', block, re.MULTILINE))} items"
    return "image" if block.startswith(("![", "<img ")) else "paragraph"


def figures(text: str) -> Counter[str]:
    """The numbers in a text, whatever stands around them; a date's month is one of them."""
    plain = unicodedata.normalize("NFKC", text)
    plain = DATE.sub(lambda found: f"{found[1]} {MONTHS.index(found[2]) + 1} {found[3]}", plain)
    return Counter(number.rstrip(",") for number in FIGURE.findall(plain))


def names(text: str) -> Counter[str]:
    """What is set in code, without its spaces."""
    return Counter(re.sub(r"\s", "", found[2]) for found in CODE.finditer(text))


def links(text: str, page: Path) -> Counter[str]:
    """The targets of links and pictures, a Chinese page counting as the English one that it translates."""

    def target(link: str) -> str:
        if "://" in link:
            return link
        path, _, fragment = link.partition("#")
        file = (page.parent / path).resolve() if path else page
        return f"{name_of(english_of(file) if file in CHINESE else file)}#{fragment}"

    return Counter(target(link) for link in LINK.findall(CODE.sub("", text)))


def statements(block: str) -> str:
    """A block of code without what is translated: comments and docstrings, or the words of a formula."""
    language, _, body = block.strip("`").partition("\n")
    if language == "python":
        tree = ast.parse(body)
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node) is not None:
                node.body = node.body[1:]
        return ast.unparse(tree)
    if language == "sh":
        return "\n".join(shlex.join(shlex.split(line, comments=True)) for line in body.splitlines())
    return skeleton(body) if language == "text" else body


def skeleton(formula: str) -> str:
    """A formula without letters and spaces: its operators, brackets and figures."""
    return re.sub(r"[^\W\d_]|\s", "", unicodedata.normalize("NFKC", formula))


@cache
def facts(block: str, page: Path) -> dict[str, object]:
    """What a block and its translation have in common."""
    if block.startswith("```"):
        comments = re.findall(r'#[^\n]*|"""[\s\S]*?"""', block)
        return {"code": statements(block), "figures of the comments": figures(" ".join(comments))}
    if block.startswith("    "):
        return {"formula": skeleton(block)}
    rows = [re.split(r"(?<!\\)\|", row) for row in block.splitlines()] if block.startswith("|") else [[block]]
    found: dict[str, object] = {}
    for r, row in enumerate(rows):
        for c, cell in enumerate(row):
            place = f" in row {r}, column {c}" if len(row) > 1 else ""
            without_targets = LINK.sub("]", cell)
            found[f"figures{place}"] = figures(CODE.sub("", without_targets))
            found[f"names{place}"] = names(without_targets)
            found[f"links{place}"] = links(cell, page)
    return found


def differences(english: str, chinese: str, english_page: Path, chinese_page: Path) -> list[str]:
    """The first block at which the two part, in words; then every block whose facts differ."""
    pairs = list(zip(blocks_of(english), blocks_of(chinese), strict=False))
    for (line, ours), (line_zh, theirs) in pairs:
        if kind(ours) != kind(theirs):
            return [f"line {line}: {kind(ours)}; in Chinese, line {line_zh}: {kind(theirs)}"]
    found = []
    for (line, ours), (line_zh, theirs) in pairs:
        in_english, in_chinese = facts(ours, english_page), facts(theirs, chinese_page)
        for what, value in in_english.items():
            if value != in_chinese[what]:
                found.append(f"line {line}, Chinese line {line_zh}: {what}\n  {value}\n  {in_chinese[what]}")
    if len(blocks_of(english)) != len(blocks_of(chinese)):
        found.append(f"{len(blocks_of(english))} blocks in English, {len(blocks_of(chinese))} in Chinese")
    return found


@cache
def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def differences_of(page: Path, chinese: str) -> list[str]:
    return differences(read(english_of(page)), chinese, english_of(page), page)


@each_chinese_page
def test_says_what_the_english_page_says(page):
    found = differences_of(page, read(page))
    assert not found, "\n".join([f"{name_of(english_of(page))} and {name_of(page)} differ:", *found])


@each_of([*CHINESE, INDEX])
def test_links_lead_somewhere(page):
    for link in LINK.findall(CODE.sub("", re.sub(r"^```.*?^```$", "", read(page), flags=re.MULTILINE | re.DOTALL))):
        if "://" in link:
            continue
        path, _, fragment = link.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{name_of(page)} links to {link}, which is not there"
        if fragment:
            headings = re.findall(r"^#+ (.+)$", read(file), re.MULTILINE)
            anchors = {slug(heading) for heading in headings} | set(re.findall(r'<a id="([^"]+)">', read(file)))
            assert fragment in anchors, f"{name_of(page)} links to {link}: no such section"


@each_chinese_page
def test_sections_have_the_ids_of_the_english_ones(page):
    """So a link to a section holds in both languages."""
    english = [block for _, block in blocks_of(read(english_of(page))) if kind(block).startswith("heading")]
    chinese = [block for _, block in blocks_of(read(page)) if kind(block).startswith("heading")]
    for ours, theirs in zip(english, chinese, strict=True):
        if given := re.search(r'<a id="([^"]+)">', theirs):
            assert given[1] == slug(ours.lstrip("# ")), f"{name_of(page)}: {theirs}"


@each_chinese_page
def test_the_two_languages_link_to_each_other_at_the_top(page):
    for here, there in ((page, english_of(page)), (english_of(page), page)):
        head = "\n\n".join(block for _, block in blocks_of(read(here))[:2])
        targets = [(here.parent / link).resolve() for link in LINK.findall(head) if "://" not in link]
        assert there in targets, f"{name_of(here)} does not link to {name_of(there)} at its top"


def test_the_index_lists_every_chinese_page():
    linked = {(INDEX.parent / link.partition("#")[0]).resolve() for link in LINK.findall(read(INDEX))}
    assert [name_of(page) for page in CHINESE if page.is_relative_to(ZH) and page not in linked] == []


def test_paragraphs_are_in_chinese():
    """None was left as it is in English."""
    for page in CHINESE:
        for line, block in blocks_of(read(page)):
            words = re.sub(r"https?://\S+", "", CODE.sub("", block))
            if kind(block).startswith(("paragraph", "list")) and len(re.findall(r"[A-Za-z]{2,}", words)) > 12:
                assert re.search(r"[\u4e00-\u9fff]", words), f"{name_of(page)}, line {line}"


@pytest.mark.parametrize(
    ("was", "becomes"),
    [
        ("| `tfa` | 2 | 1e-3 |", "| `tfa` | 2 | 1e-5 |"),
        ("| `tfa` | 2 | 1e-3 |", "| `tf` | 2 | 1e-3 |"),
        ("| `tfa` | 2 | 1e-3 |\n", ""),
        ("快 1.5 倍", "快 1.6 倍"),
        ("第 4 步", "第 5 步"),
        ("归一化 2 层", "归一化两层"),
        ("normwise.LSTM(8, 16)", "normwise.LSTM(8, 32)"),
        ("h' = z * h", "h' = z + h"),
        ("../surgery.md", "../gpu.md"),
        ("- 乙\n", ""),
        ("末段。\n", ""),
        ("## 节", "### 节"),
    ],
)
def test_a_difference_is_found(was, becomes):
    english = """# Page

Faster by 1.5, see [surgery](surgery.md); norms of 2 layers.

## Section

| variant | biases | eps |
|---|---|---|
| `tfa` | 2 | 1e-3 |

    h' = z * h

```python
lstm = normwise.LSTM(8, 16)  # at step 4
```

- a
- b

The end.
"""
    chinese = """# 页

快 1.5 倍。见[改造](../surgery.md)。归一化 2 层。

## 节

| 变体 | 偏置 | eps |
|---|---|---|
| `tfa` | 2 | 1e-3 |

    h' = z * h

```python
lstm = normwise.LSTM(8, 16)  # 在第 4 步
```

- 甲
- 乙

末段。
"""
    pages = ROOT / "docs" / "layers.md", ZH / "layers.md"
    assert differences(english, chinese, *pages) == []
    assert was in chinese
    assert differences(english, chinese.replace(was, becomes), *pages)


@each_chinese_page
def test_each_figure_of_a_table_is_compared(page):
    """One figure after another is changed in the real page, and each time it is found."""
    text = read(page)
    rows = [found for found in re.finditer(r"^\|.*\|$", text, re.MULTILINE) if FIGURE.search(CODE.sub("", found[0]))]
    for row in rows[:: max(1, len(rows) // 8)]:
        bare = re.sub(r"`[^`]*`|\]\([^)]*\)", lambda found: " " * len(found[0]), row[0])
        for figure in FIGURE.finditer(bare):
            spot = row.start() + figure.start()
            planted = text[:spot] + "7654321" + text[spot + len(figure[0]) :]
            assert differences_of(page, planted), f"{name_of(page)}: {figure[0]} in {row[0]}"
