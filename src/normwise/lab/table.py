"""A small table of numbers: the one that `normwise explain` starts from, and how to read a user's own."""

from __future__ import annotations

import csv
import math
import re
from dataclasses import dataclass
from pathlib import Path

from normwise.lab.errors import LabError
from normwise.words import counted


@dataclass(frozen=True)
class Table:
    """Numbers with a name for each column and each row; `values[row][column]`."""

    columns: list[str]
    rows: list[str]
    values: list[list[float]]


PEOPLE = Table(
    columns=["height cm", "weight kg", "age years"],
    rows=["Anna", "Ben", "Chloe", "David", "Emma"],
    values=[[168, 61, 34], [183, 82, 41], [159, 52, 27], [176, 77, 58], [104, 17, 4]],
)


def read_csv(path: Path) -> Table:
    """Read comma-separated numbers.

    The first line is a header if none of its cells is a number. The first column holds the rows' names if none of
    its cells is a number (below the header); otherwise rows are named by their line in the file.

    Raises:
        LabError: naming file, line and column: not UTF-8 text, no rows, a line with another number of cells,
            a cell that is not a finite number.
    """
    lines = _cells(path)
    try:
        return _table(path, lines)
    except LabError as error:
        raise LabError(f"{error}{_hint(lines)}") from None


def _table(path: Path, lines: list[tuple[int, list[str]]]) -> Table:
    if not lines:
        raise LabError(f"{path}: the file has no rows; expected comma-separated numbers")
    first_line, first = lines[0]
    width = len(first)
    for line, cells in lines:
        if len(cells) != width:
            raise LabError(f"{path}, line {line}: {counted(len(cells), 'cell')}, but line {first_line} has {width}")

    has_header = not any(_is_number(cell) for cell in first)
    body = lines[1:] if has_header else lines
    if not body:
        raise LabError(f"{path}: the file has a header and no rows; expected numbers below line {first_line}")
    # "$5" and "1,000" are no names but numbers written as none can be read, and refused as such.
    has_names = width > 1 and not any(_is_number(cells[0]) or _is_almost(cells[0]) for _, cells in body)
    start = 1 if has_names else 0
    columns = first[start:] if has_header else [f"column {i + 1}" for i in range(start, width)]
    return Table(
        columns=columns,
        rows=[cells[0] if has_names else f"line {line}" for line, cells in body],
        values=[
            [
                _number(cell, f"{path}, line {line}, column {i + 1}" + (f" ({first[i]})" if has_header else ""))
                for i, cell in enumerate(cells)
                if i >= start
            ]
            for line, cells in body
        ],
    )


def _cells(path: Path) -> list[tuple[int, list[str]]]:
    """(line number, cells) of every line that is not blank."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            # csv leaves out spaces before a quote, and takes those behind one for a fault.
            plain = (re.sub(r'"[ \t]+(?=,|\r?\n|$)', '"', line) for line in file)
            reader = csv.reader(plain, skipinitialspace=True, strict=True)
            lines = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader]
    except OSError as error:
        raise LabError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise LabError(f"{path}: not UTF-8 text (byte {error.start}); save the file as UTF-8") from error
    except csv.Error as error:
        raise LabError(f"{path}, line {reader.line_num}: not comma-separated text: {error}") from error
    return [(line, cells) for line, cells in lines if any(cells)]


def _hint(lines: list[tuple[int, list[str]]]) -> str:
    """One more sentence where every line has as many of another separator."""
    for mark, name in ((";", "semicolons"), ("\t", "tabs"), ("|", "bars")):
        counts = {sum(cell.count(mark) for cell in cells) for _, cells in lines}
        if len(counts) == 1 and counts != {0}:
            return f". It seems to be separated by {name}: save it with commas between the cells and points in decimals"
    return ""


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _number(cell: str, where: str) -> float:
    if not cell:
        raise LabError(f"{where}: the cell is empty; expected a number")
    if not _is_number(cell):
        raise LabError(f"{where}: {cell!r} is not a number; {_written(cell)}")
    value = float(cell)
    if not math.isfinite(value):
        raise LabError(f"{where}: {cell!r} is not finite; statistics need finite numbers")
    return value


GROUPED = re.compile(r"[+-]?\d{1,3}(?:[ ,'\u00a0\u2009\u202f]\d{3})+(?:\.\d+)?")
DECIMAL_COMMA = re.compile(r"[+-]?\d*,\d+")
WITH_A_MARK = re.compile(r"(?:[$€£¥]\s?)?([+-]?\d+(?:\.\d+)?)\s?(?:[$€£¥%])?")
MISSING = ("-", "na", "n/a", "null", "none", "?", ".")


def _is_almost(cell: str) -> bool:
    """A number with marks between its thousands, a decimal comma, a sign of currency or per cent."""
    return any(form.fullmatch(cell) for form in (GROUPED, DECIMAL_COMMA, WITH_A_MARK))


def _written(cell: str) -> str:
    """What kind of text the cell is, and how it would be a number."""
    if GROUPED.fullmatch(cell):
        return f"write it without marks between the thousands, as {re.sub(r'[^0-9.+-]', '', cell)}"
    if DECIMAL_COMMA.fullmatch(cell):
        return f"decimals take a point: {cell.replace(',', '.')}"
    if bare := WITH_A_MARK.fullmatch(cell):
        return f"write the number alone, as {bare[1]}, and its unit into the column's name"
    if cell.lower() in MISSING:
        return "a missing value has no place here: leave out its row or its column"
    return "cells are separated by commas, decimals take a point"
