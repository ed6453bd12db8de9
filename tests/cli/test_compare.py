from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support.pages import ROOT, blocks

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "custom_task.py"
SMALL = ("--steps", "4", "--seeds", "2", "--lr", "0.1", "--batch-sizes", "16,1", "--jobs", "1")


def stored(path):
    with sqlite3.connect(path) as connection:
        (count,) = connection.execute("SELECT count(*) FROM runs").fetchone()
    connection.close()
    return count


def test_table_report_and_store(normwise_command, tmp_path):
    arguments = ("compare", "mlp", "--norms", "none,batch,layer", *SMALL, "--out", str(tmp_path))
    status, out, err = normwise_command(*arguments)
    assert status == 0
    assert "batch 16" in out
    assert "undefined" in out
    assert "Expected more than 1 value per channel" in " ".join(out.split())
    assert str(tmp_path / "report.html") in out
    assert "12/12" in err
    assert max(map(len, out.splitlines()[:-2])) <= 80  # the last two lines are paths
    assert 2e4 < (tmp_path / "report.html").stat().st_size < 2e6  # of which the charts' script is 0.9 MB
    assert stored(tmp_path / "runs.sqlite") == 12


def test_json_alone_is_on_stdout_and_a_second_call_trains_nothing(normwise_command, tmp_path):
    arguments = ("compare", "mlp", "--norms", "batch, layer", *SMALL, "--out", str(tmp_path), "--json")
    first = json.loads(normwise_command(*arguments).out)
    start = time.perf_counter()
    again = json.loads(normwise_command(*arguments).out)
    assert again == first  # times per step as well: they come from the store
    assert time.perf_counter() - start < 20
    assert [(row["batch_size"], row["norm"], row["status"]) for row in first["rows"]] == [
        (16, "batch", "done"),
        (16, "layer", "done"),
        (1, "batch", "undefined"),
        (1, "layer", "done"),
    ]
    accuracy = first["rows"][0]["accuracy"]
    assert len(accuracy["values"]) == 2
    assert accuracy["mean"] == pytest.approx(sum(accuracy["values"]) / 2)


def test_quick_is_one_seed_and_a_few_batches(normwise_command, tmp_path):
    few = ("compare", "mlp", "--norms", "none,layer", "--batch-sizes", "16", "--lr", "0.1", "--out", str(tmp_path))
    status, out, _ = normwise_command(*few, "--quick", "--json")
    assert status == 0
    assert [len(row["accuracy"]["values"]) for row in json.loads(out)["rows"]] == [1, 1]
    again = json.loads(normwise_command(*few, "--seeds", "1", "--steps", "30", "--json").out)
    assert again["rows"] == json.loads(out)["rows"]
    text = normwise_command(*few, "--quick").out
    assert "--seeds 3" in text
    assert "±" not in text
    assert "ties" not in text
    assert stored(tmp_path / "runs.sqlite") == 2


def test_more_seeds_add_runs_to_those_there(normwise_command, tmp_path):
    arguments = ("compare", "mlp", "--norms", "layer", *SMALL, "--out", str(tmp_path))
    normwise_command(*arguments)
    assert stored(tmp_path / "runs.sqlite") == 4
    err = normwise_command(*arguments, "--seeds", "3").err
    assert stored(tmp_path / "runs.sqlite") == 6
    assert "6/6" in err


def test_the_example_of_a_user_s_own_task(normwise_command, tmp_path):
    arguments = (
        "--task",
        f"{EXAMPLE}:make_task",
        "--steps",
        "60",
        "--lr",
        "0.05",
        "--jobs",
        "1",
        "--batch-sizes",
        "32",
    )
    result = json.loads(normwise_command("compare", *arguments, "--out", str(tmp_path), "--json").out)
    assert [row["norm"] for row in result["rows"]] == ["none", "batch", "layer", "rms"]
    assert all(row["task"] == "speakers" for row in result["rows"])
    assert min(row["accuracy"]["mean"] for row in result["rows"]) > 0.8


def test_the_task_on_the_page_of_the_lab_is_a_file_that_runs(normwise_command, tmp_path):
    (_, text), *_ = blocks(ROOT / "docs" / "lab.md", "python")
    file = tmp_path / "rings.py"
    file.write_text(text)
    status, out, err = normwise_command(
        "compare", "--task", f"{file}:make_task", "--quick", "--jobs", "1", "--json", "--out", str(tmp_path)
    )
    assert status == 0, err
    rows = json.loads(out)["rows"]
    assert {(row["task"], row["norm"], row["batch_size"]) for row in rows} == {
        ("rings", norm, size) for norm in ("none", "batch", "layer", "rms") for size in (32, 4)
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mpl"], "unknown task 'mpl'; did you mean mlp?"),
        (["clm"], "unknown task 'clm'; did you mean charlm or lstm?"),
        (["--norms", "bacth"], "unknown norm 'bacth' for task 'mlp'; did you mean batch?"),
        (["--batch-sizes", "8,x"], "'8,x' is not a list of integers"),
        (["--batch-sizes", "0"], "batch size 0 is not in 1..4000"),
        (["--lr", "fast"], "'fast' is not a list of numbers"),
        (["--lr", "-1"], "learning rate -1.0 is not a positive"),
        (["--seeds", "0"], "--seeds"),
        (["--steps", "0"], "--steps"),
        (["--quick", "--steps", "9"], "--quick is --seeds 1 --steps 30"),
        (["--quick", "--seeds", "9"], "--quick is --seeds 1 --steps 30"),
        (["--task", "nowhere.py:make"], "'nowhere.py': no such file"),
        (["--task", f"{EXAMPLE}"], "not of the form FILE.py:function"),
        (["--task", f"{EXAMPLE}:make_tusk"], "no function 'make_tusk'"),
    ],
)
def test_bad_arguments_exit_2_and_make_nothing(normwise_command, tmp_path, arguments, message):
    out = tmp_path / "out"
    status, printed, err = normwise_command("compare", *arguments, "--out", str(out))
    assert (status, printed) == (2, "")
    assert message in err
    assert not out.exists()


def test_a_damaged_store_is_named_and_left_alone(normwise_command, tmp_path):
    store = tmp_path / "runs.sqlite"
    store.write_bytes(b"rubbish")
    status, out, err = normwise_command("compare", "mlp", *SMALL, "--out", str(tmp_path))
    assert (status, out) == (2, "")
    assert str(store) in err
    assert store.read_bytes() == b"rubbish"
    assert [file.name for file in tmp_path.iterdir()] == ["runs.sqlite"]


@pytest.mark.skipif(os.name == "nt", reason="Ctrl-C is a console event there, not a signal that a test can send")
def test_ctrl_c_exits_130_keeps_what_is_finished_and_the_next_call_goes_on(tmp_path):
    program = (sys.executable, "-c", "from normwise.cli.main import main; main()")
    arguments = ("compare", "mlp", "--norms", "layer", "--seeds", "60", "--steps", "40", "--lr", "0.1")
    command = [*program, *arguments, "--batch-sizes", "8", "--jobs", "2", "--out", str(tmp_path)]
    # A session of its own, so that the signal reaches the whole group, as a terminal's Ctrl-C does.
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        deadline = time.monotonic() + 90
        while not (tmp_path / "runs.sqlite-wal").exists() or stored(tmp_path / "runs.sqlite") < 2:
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=60)
    kept = stored(tmp_path / "runs.sqlite")
    assert process.returncode == 130
    assert f"Stopped: {kept} of 60 runs are kept" in err
    assert "Traceback" not in err
    assert 2 <= kept < 60
    assert not (tmp_path / "report.html").exists()

    smaller = [*program, *arguments, "--batch-sizes", "8", "--jobs", "1", "--out", str(tmp_path), "--seeds", str(kept)]
    subprocess.run(smaller, check=True, capture_output=True, timeout=120)
    assert stored(tmp_path / "runs.sqlite") >= kept
    assert (tmp_path / "report.html").exists()


def test_a_task_on_sequences_has_its_parts_in_the_table(normwise_command, tmp_path):
    arguments = ("compare", "rnn", "--norms", "none,layer", "--steps", "2", "--seeds", "1", "--lr", "0.01")
    status, out, _ = normwise_command(*arguments, "--batch-sizes", "32", "--jobs", "1", "--out", str(tmp_path))
    assert status == 0
    for heading in ("held-out accuracy, %", "accuracy on longer, %", "accuracy on longer-cut, %", "training loss"):
        assert heading in out
    assert max(map(len, out.splitlines()[:-2])) <= 80


def test_text_of_the_user_s_is_compared_by_bits_per_character(normwise_command, tmp_path):
    text = tmp_path / "text"
    text.write_text("to be or not to be, that is the question. " * 200)
    arguments = ("compare", "charlm", "--text", str(text), "--norms", "none,layer", "--steps", "2", "--seeds", "1")
    arguments += ("--lr", "0.01", "--batch-sizes", "4", "--jobs", "1", "--out", str(tmp_path))
    status, out, _ = normwise_command(*arguments)
    assert status == 0
    for task in ("charlm-lstm", "charlm-gru", "charlm-transformer"):
        assert f"\n{task} " in f"\n{out}"
    assert "held-out bits per character" in out
    assert "accuracy, %" not in out


def test_a_text_for_tasks_that_read_none_is_refused(normwise_command, tmp_path):
    status, _, err = normwise_command("compare", "mlp", "--text", "x", "--out", str(tmp_path / "out"))
    assert status == 2
    assert "only tasks on text read a file: charlm," in " ".join(err.split())
    assert not (tmp_path / "out").exists()


def test_a_scheduler_that_is_not_there_is_one_line(normwise_command, tmp_path):
    pytest.importorskip("distributed", reason="the extra normwise[cluster] is not installed")
    arguments = ("compare", "mlp", *SMALL, "--scheduler", "nonsense://x", "--out", str(tmp_path))
    status, out, err = normwise_command(*arguments)
    assert (status, out) == (2, "")
    assert "normwise: error: no Dask scheduler answers at 'nonsense://x'" in err
    assert stored(tmp_path / "runs.sqlite") == 0
