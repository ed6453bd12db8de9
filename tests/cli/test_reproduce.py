from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from normwise.lab.store import Store
from support.idx_files import write_folder

SMALL = ("--steps", "400", "--jobs", "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("idx"), packed=True)


def numbers(out):
    with Store(out / "runs.sqlite", make=False) as store:
        runs = sorted(store.runs(store.keys()), key=lambda run: run.identity["norm"])
    return [{name: curve for name, curve in run.series.items() if name != "time/step"} for run in runs]


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL there")
def test_killed_and_started_again_it_goes_on_to_the_same_numbers(normwise_command, folder, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    arguments = ("reproduce", "bn-mnist", "--data", str(folder), *SMALL)
    status, out, _ = normwise_command(*arguments, "--out", str(whole))
    assert status == 0
    assert str(whole / "bn-mnist.html") in out
    program = "from normwise.lab import checkpoint; checkpoint.SECONDS = 0; from normwise.cli.main import main; main()"
    command = [sys.executable, "-c", program, *arguments, "--out", str(killed)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"}) as process:
        deadline = time.monotonic() + 90
        while not list((killed / "checkpoints").glob("*.pt")):
            assert process.poll() is None, process.stderr.read().decode()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.3)
        os.kill(process.pid, signal.SIGKILL)
    assert len(numbers(killed)) < 2
    assert list((killed / "checkpoints").glob("*.pt"))
    assert normwise_command(*arguments, "--out", str(killed)).status == 0
    assert numbers(killed) == numbers(whole)
    assert not list((killed / "checkpoints").glob("*.pt"))
    page = (killed / "bn-mnist.html").read_text(encoding="utf-8")
    assert "Figure 1a of the paper: test accuracy over the steps" in page
    assert "Figure 1b and 1c of the paper" in page


def test_json(normwise_command, folder, tmp_path):
    arguments = ("reproduce", "bn-mnist", "--data", str(folder), "--steps", "3", "--seeds", "2", "--jobs", "1")
    found = json.loads(normwise_command(*arguments, "--out", str(tmp_path), "--json").out)
    assert [(row["norm"], row["seeds"]) for row in found["rows"]] == [("none", [0, 1]), ("batch", [0, 1])]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("bn-mnits",), "unknown set-up 'bn-mnits'; did you mean bn-mnist"),
        (("bn-mnist", "--data", "nowhere"), "nowhere: no such folder; expected the four IDX files"),
        (("bn-mnist", "--quick", "--steps", "3"), "--quick and --steps both say how long to train"),
        (("bn-mnist", "--steps", "0"), "--steps"),
        (("ln-mnist", "--norms", "none,lyaer"), "unknown norm 'lyaer' for task 'ln-mnist'; did you mean layer"),
        (("ln-mnist", "--batch-sizes", "128,x"), "'128,x' is not a list of integers"),
        (("ln-mnist", "--batch-sizes", "0"), "ln-mnist has no batch size 0: the paper trains at 128 and 4"),
    ],
)
def test_bad_arguments_exit_2_and_make_nothing(normwise_command, folder, tmp_path, arguments, message):
    status, out, err = normwise_command("reproduce", "--data", str(folder), *arguments, "--out", str(tmp_path / "out"))
    assert (status, out) == (2, "")
    assert message in err
    assert not (tmp_path / "out").exists()


def test_a_truncated_file_is_named_with_the_offset(normwise_command, tmp_path):
    folder = write_folder(tmp_path / "idx")
    images = folder / "train-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:100_000])
    status, _, err = normwise_command("reproduce", "ln-mnist", "--data", str(folder), "--out", str(tmp_path / "out"))
    assert status == 2
    assert f"{images}: offset 100000: the file ends here, and 400x28x28 numbers need 313616 bytes" in err
    assert not (tmp_path / "out").exists()
