from __future__ import annotations

import dataclasses
import json

import pytest

from normwise.lab.explain import explain
from normwise.lab.table import PEOPLE


def test_text_fits_80_columns_and_shows_the_numbers(normwise_command):
    status, out, err = normwise_command("explain")
    assert (status, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    for part in ("1. BatchNorm", "2. LayerNorm", "3. Gain and bias", "4. How many", "5. What changes"):
        assert f"\n{part}" in out
    # Means and variances of the columns, worked out by hand: 168+183+159+176+104 = 790 and so on.
    assert "  mean            158.00     57.80     32.80\n" in out
    assert "  variance        793.20    532.56    313.36\n" in out
    assert "-0.00" not in out


def test_every_number_of_the_text_is_in_the_json(normwise_command):
    status, out, err = normwise_command("explain", "--json")
    assert (status, err) == (0, "")
    assert json.loads(out) == dataclasses.asdict(explain(PEOPLE))


def test_a_table_of_ones_own(normwise_command, tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("x,y\n1,10\n2,20\n3,60\n")
    out = normwise_command("explain", "--csv", str(path)).out
    assert "The table: 3 rows, 2 columns" in out
    assert "  mean              2.00     30.00\n" in out
    assert "taken away: line 4\n" in out
    assert "taken away: line 2\n" in normwise_command("explain", "--csv", str(path), "--drop", "1").out


def test_a_wide_and_long_table_is_cut_to_the_terminal_and_says_so(normwise_command, tmp_path):
    path = tmp_path / "t.csv"
    lines = [",".join(["a very long name"] + [f"a very long column {i}" for i in range(9)])]
    lines += [",".join([f"row number {i} of many"] + [str(1e7 * i + j * j) for j in range(9)]) for i in range(30)]
    path.write_text("\n".join(lines))
    out = normwise_command("explain", "--csv", str(path)).out
    assert max(map(len, out.splitlines())) <= 80
    assert "(and 18 more rows and 5 more columns: --json prints all)" in out
    whole = json.loads(normwise_command("explain", "--csv", str(path), "--json").out)
    assert len(whole["batch_norm"]["output"]) == 30
    assert len(whole["batch_norm"]["mean"]) == 9


@pytest.mark.parametrize("drop", ["0", "6", "x"])
def test_a_row_that_is_not_there_is_refused(normwise_command, drop):
    status, out, err = normwise_command("explain", "--drop", drop)
    assert (status, out) == (2, "")
    assert "Invalid value for '--drop'" in err


def test_a_file_that_is_not_there_is_refused(normwise_command, tmp_path):
    status, out, err = normwise_command("explain", "--csv", str(tmp_path / "missing.csv"))
    assert (status, out) == (2, "")
    assert "missing.csv' does not exist" in err
