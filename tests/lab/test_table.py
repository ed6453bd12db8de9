from __future__ import annotations

import re

import pytest

from normwise.lab.errors import LabError
from normwise.lab.table import read_csv


def read(tmp_path, content: str | bytes):
    path = tmp_path / "t.csv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_csv(path)


def test_header_and_names_are_optional(tmp_path):
    full = read(tmp_path, "who,height,age\nAnna,168,34\nBen,183.5,-4e1\n")
    assert (full.columns, full.rows) == (["height", "age"], ["Anna", "Ben"])
    assert full.values == [[168, 34], [183.5, -40]]
    assert read(tmp_path, "Anna,168,34\nBen,183.5,-4e1\n").rows == ["Anna", "Ben"]
    headed = read(tmp_path, "height,age\n168,34\n183.5,-4e1\n")
    assert (headed.columns, headed.rows) == (["height", "age"], ["line 2", "line 3"])
    bare = read(tmp_path, "168,34\n183.5,-4e1\n")
    assert (bare.columns, bare.rows) == (["column 1", "column 2"], ["line 1", "line 2"])
    assert full.values == headed.values == bare.values


def test_blank_lines_spaces_quotes_and_a_byte_order_mark_are_no_matter(tmp_path):
    table = read(tmp_path, '\ufeff"height, cm", age \n\n 168 ,34\n\n183, "41"\n')
    assert table.columns == ["height, cm", "age"]
    assert table.rows == ["line 3", "line 5"]
    assert table.values == [[168, 34], [183, 41]]
    named = read(tmp_path, 'who , "height, cm" , body mass\n "Anna B." , "168" , 61\nBen,183 ,82\n')
    assert (named.columns, named.rows) == (["height, cm", "body mass"], ["Anna B.", "Ben"])
    assert named.values == [[168, 61], [183, 82]]
    assert read(tmp_path, "day,a,b\n2026-01-02,1,2\n2026-01-03,3,4\n").rows == ["2026-01-02", "2026-01-03"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no rows"),
        ("\n \n", "has no rows"),
        ("a,b\n", "a header and no rows; expected numbers below line 1"),
        ("a,b\n1,2\n3\n", "line 3: 1 cell, but line 1 has 2"),
        ("a,b\n1,2\n3,x\n", "line 3, column 2 (b): 'x' is not a number"),
        ("1,2\n3,x\n", "line 2, column 2: 'x' is not a number"),
        ("a,b\n1,2\n3x,4\n", "line 3, column 1 (a): '3x' is not a number"),
        ("a,b\n1,2\n3,\n", "line 3, column 2 (b): the cell is empty"),
        ("a,b\n1,nan\n", "line 2, column 2 (b): 'nan' is not finite"),
        ("a,b\n1,inf\n", "line 2, column 2 (b): 'inf' is not finite"),
        ("a;b\n1;2\n", "cells are separated by commas"),
        ("a;b\n1;2\n", "It seems to be separated by semicolons: save it with commas"),
        ("a;b\n1,5;2\n", "line 2: 2 cells, but line 1 has 1. It seems to be separated by semicolons"),
        ("1,5;2,5\n3,5;4,5\n", "'5;2' is not a number; cells are separated by commas, decimals take a point. It seems"),
        ("a\tb\n1\t2\n", "It seems to be separated by tabs"),
        ('a,b\nx,"1,000"\n', "line 2, column 2 (b): '1,000' is not a number; write it without marks between the"),
        ('a,b\n"-12 345.5",3\n', "as -12345.5"),
        ('a,b\n"1,5",3\n', "line 2, column 1 (a): '1,5' is not a number; decimals take a point: 1.5"),
        ("a,b\n1,3%\n", "'3%' is not a number; write the number alone, as 3, and its unit into the column's name"),
        ("a,b,c\n$5,1,2\n", "line 2, column 1 (a): '$5' is not a number; write the number alone, as 5"),
        ("a,b\n1,N/A\n", "'N/A' is not a number; a missing value has no place here: leave out its row"),
        ('a,b\n1,2\n"3,4\n', "line 3: not comma-separated text"),
        (b"a,b\n1,\xff\n", "not UTF-8 text (byte 6)"),
    ],
)
def test_a_fault_is_named_with_its_place_and_cure(tmp_path, content, message):
    with pytest.raises(LabError, match=re.escape(message)):
        read(tmp_path, content)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(LabError, match=r"missing\.csv: cannot be read: No such file"):
        read_csv(tmp_path / "missing.csv")
