"""`python -m benchmarks gpu` where there is neither a GPU nor Triton: what it refuses, how it takes turns and ends, and
the tables that it makes. tests/triton_kernels/ runs it from end to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import __main__ as entry
from benchmarks.gpu import command
from benchmarks.gpu.clock import Device, spread
from benchmarks.gpu.log import Log
from benchmarks.gpu.table import markdown

MACHINE = {"gpu": "Some GPU", "multiprocessors": 132, "torch": "2.11.0+cu130", "triton": "3.6.0", "driver_version": "1"}


def phase(*figures: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"figures": list(figures), "not_measured": [], "died": None, "seconds": 1.0} | more


def times(median: float, ratio: float | None = None) -> dict[str, Any]:
    found: dict[str, Any] = {"median": median, "p20": median, "p80": median, "rounds": 15}
    return found if ratio is None else found | {"ratio": {"median": ratio, "p20": ratio - 0.1, "p80": ratio + 0.1}}


RESULTS: dict[str, Any] = {
    "kind": "gpu",
    "dry": False,
    "minutes": 9,
    "seconds": 500.0,
    "machine": MACHINE,
    "phases": {
        "build": phase({"case": "compiled", "done": 3, "of": 4}),
        "device": phase({"case": "copy", "unit": "GB/s", "value": 4300.0}, {"case": "barrier", "failed": "Oops: no"}),
        "correct": phase({"case": "LayerNorm", "error": 0.3}, {"case": "GRU", "error": 0.0, "refused": "too wide"}),
        "recurrent": phase(
            {
                "case": "LSTM",
                "cell": "LSTM",
                "shape": [100, 32, 256, 256],
                "dtype": "bfloat16",
                "mode": "forward",
                "ways": {"cuDNN, no norm": times(2e-4), "stepwise": times(8e-4, 4.0)},
                "refused": {"persistent": "BackendError: too wide"},
                "launches": {"stepwise": 2.0},
            },
            not_measured=["LN-GRU"],
        ),
        "norms": phase(died="did not come back in time, in RMSNorm"),
    },
}


def test_the_table_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps(RESULTS))
    assert entry.main(["table", str(file)]) == 0
    told = capsys.readouterr().out
    assert "gpu Some GPU, multiprocessors 132, torch 2.11.0+cu130, triton 3.6.0" in told
    assert "| copy | 4300.00 GB/s |" in told
    assert "- barrier: Oops: no" in told
    assert "1 of 2 cases right, 1 refused; the largest error is 0.30 of what is allowed (LayerNorm)." in told
    row = "| LN-LSTM (100, 32, 256, 256) | bfloat16 | forward | 2 | 8 (4.00, 3.90..4.10) | refused | stepwise 2 |"
    assert row in told.splitlines()
    assert "- persistent: BackendError: too wide" in told
    assert "Not measured, 1 cases for which there was no time: LN-GRU." in told
    assert "The phase did not come back in time, in RMSNorm; what it had until then stands here." in told
    assert "dry" not in told.lower()


def test_a_dry_run_says_so_first() -> None:
    assert markdown({"dry": True, "machine": {}, "phases": {}}).startswith("**Dry run: Triton's interpreter")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.main(["gpu"]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.strip() == command.NO_GPU
    assert "--dry" in told.err


def test_help_says_how_it_ends(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        entry.main(["gpu", "--help"])
    told = capsys.readouterr().out
    assert all(word in told for word in ("--dry", "--minutes", "--json", "--keep-going", "Exit code: 0; 1"))


@pytest.mark.parametrize(
    "proof",
    [
        phase({"case": "a", "error": 1.5}),
        phase({"case": "a", "error": 0.0, "failed": "3 of 20 repetitions gave other bits"}),
        phase({"case": "a", "error": 0.5}, died="exit code -11, in b"),
        phase({"case": "a", "error": 0.5}, not_measured=["b"]),
    ],
    ids=["wrong", "other bits", "died", "no time"],
)
@pytest.mark.parametrize("keep_going", [False, True])
def test_nothing_is_timed_after_a_red_proof(
    proof: dict[str, Any], keep_going: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    begun = []

    def child(name: str, seconds: float, options: Any) -> dict[str, Any]:
        begun.append(name)
        return json.loads(json.dumps(proof)) if name == "correct" else phase()

    monkeypatch.setattr(command, "_in_child", child)
    file = tmp_path / "gpu.json"
    arguments = ["gpu", "--dry", "--json", str(file), *(["--keep-going"] if keep_going else [])]
    assert entry.main(arguments) == 1
    assert begun == (list(command.PHASES) if keep_going else ["build", "device", "correct"])
    assert ("stopped" in json.loads(file.read_text())["phases"]["norms"]) is not keep_going


def test_phases_share_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {}

    def child(name: str, seconds: float, options: Any) -> dict[str, Any]:
        given[name] = seconds
        return phase()

    monkeypatch.setattr(command, "_in_child", child)
    monkeypatch.setattr(command, "_missing", lambda: None)
    assert entry.main(["gpu", "--minutes", "4.5"]) == 0
    assert given == {name: pytest.approx(270 * share, abs=5) for name, share in command.PHASES.items()}


def test_a_phase_that_dies_is_named_with_its_case(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here of what Triton is missing for, or of a list of cases that there is not."""
    options = command.argparse.Namespace(only="", dry=True)
    found = command._in_child("no such phase", 60.0, options)
    assert found["died"] == "exit code 2"
    monkeypatch.setattr(command, "GRACE_SECONDS", 0.0)
    assert command._in_child("norms", 0.01, options)["died"] == "did not come back in time"


def test_cases_are_left_out_when_the_time_is_up_and_errors_are_figures(tmp_path: Path) -> None:
    def figure_of(case: str, seconds: float) -> dict[str, Any]:
        if case == "bad":
            raise ValueError("of no use\nat all")
        if case == "slow":
            log.deadline = 0.0
        return {"error": 0.0}

    log = Log(tmp_path / "lines", float("inf"))
    log.each(["good", "bad", "slow", "late", "later"], str, figure_of, str)
    lines = [json.loads(line) for line in log.path.read_text().splitlines()]
    figures = [figure for line in lines for figure in line.get("figures", [])]
    assert [figure["case"] for figure in figures] == ["good", "bad", "slow"]
    assert figures[1]["failed"] == "ValueError: of no use"
    assert lines[-1] == {"not_measured": ["late", "later"]}
    assert [line["begun"] for line in lines if "begun" in line] == ["good", "bad", "slow"]


class Clock:
    """A GPU whose time passes by what is called."""

    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = Clock.now

    def elapsed_time(self, other: Clock) -> float:
        return 1e3 * (other.at - self.at)


def test_ways_take_turns_and_ratios_are_of_one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that grows slower from round to round changes the times and not the ratio."""
    monkeypatch.setattr(torch.cuda, "Event", Clock)
    device = Device(dry=False)
    monkeypatch.setattr(device, "wait", lambda: None)
    monkeypatch.setattr(device, "_repeats", lambda call: 2)
    order: list[str] = []

    def way(name: str, seconds: float) -> Any:
        def call() -> None:
            order.append(name)
            Clock.now += seconds * (1 + len(order) // 6)

        return call

    found = device.times({"a": way("a", 1.0), "b": way("b", 3.0), "c": way("c", 2.0)}, 60.0, {"b": "a"})
    assert order[:12] == list("aabbccaabbcc")
    assert found["a"]["rounds"] == 15
    assert found["a"]["p80"] > found["a"]["median"] > found["a"]["p20"] >= 1.0
    assert found["b"]["ratio"]["median"] == pytest.approx(3.0, rel=0.01)
    assert "ratio" not in found["c"]


def test_spread() -> None:
    assert spread([5.0, 1.0, 2.0, 4.0, 3.0, 6.0]) == {"median": 4.0, "p20": 2.0, "p80": 5.0}
