"""The command line of the benchmarks, and the tables that it makes of their figures; nothing here is timed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import __main__ as command

MACHINE = {"processor": "Some CPU", "cores": 2, "isa": "avx512", "torch": "2.13", "python": "3.11", "load": 0.1}


def timed(case: str, threads: int, median: float, **more: object) -> dict[str, object]:
    figure = {"suite": "norms", "case": case, "against": "torch.nn", "threads": threads, "error": 0.1, "must": 0.5}
    return figure | {"median": median, "p20": 0.3, "p80": 0.6, "theirs": 2e-3, "limit": 1e-3} | more


RESULTS = {
    "memory kept": {"machine": MACHINE, "figures": [timed("BatchNorm", 2, 0.4), timed("BatchNorm", 1, 0.45)]},
    "default": {"machine": MACHINE, "figures": [timed("BatchNorm", 2, 0.55), {**timed("Wrong", 2, 0), "error": 7.0}]},
    "memory returned": {
        "machine": MACHINE,
        "figures": [
            {"suite": "memory", "case": "BatchNorm", "against": "torch.nn", "threads": 2, "error": 0.0, "median": 0.5}
            | {"kept": 1 << 20, "their_kept": 2 << 20, "peak": 3 << 20, "their_peak": 6 << 20}
        ],
    },
}


def test_the_table_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "bench.json"
    file.write_text(json.dumps(RESULTS))
    assert command.main(["table", str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "Some CPU, 2 cores, avx512; torch 2.13" in lines[0]
    assert "| case | against | 2 threads | 1 thread | default allocator | limit |" in lines
    row = "| BatchNorm | torch.nn | 0.40 (0.30..0.60) | 0.45 (0.30..0.60) | 0.55 (0.30..0.60) | 0.50 |"
    assert row in lines
    assert any(line.startswith("| Wrong") and "wrong result" in line for line in lines)
    assert "| BatchNorm | torch.nn | 1.0 | 2.0 | 3.0 | 6.0 | 0.50 |" in lines


def test_unknown_suites_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["speed"])
    assert "unknown suite 'speed': expected one of norms, fused" in capsys.readouterr().err


def test_help_names_the_suites(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--help"])
    told = capsys.readouterr().out
    assert all(suite in told for suite in ("norms", "fused", "recurrent", "memory", "table FILE"))
