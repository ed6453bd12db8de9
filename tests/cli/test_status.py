"""The exit status of every subcommand, and what a user's code prints and raises under it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from unittest.mock import Mock

import pytest

from normwise.lab.run import Result, Series
from normwise.lab.store import Store
from support.idx_files import write_folder

# For each subcommand its arguments, and a function of normwise that it calls on its way.
CALLS = {
    "claims": (["claims", "--only", "identity"], "normwise.lab.claim.judge"),
    "compare": (["compare", "mlp"], "normwise.lab.spec.expand"),
    "diagnose": (["diagnose", "{dir}/model.py:make"], "normwise.diagnosis.diagnose"),
    "explain": (["explain"], "normwise.lab.explain.explain"),
    "info": (["info"], "normwise.cli.info.gather"),
    "report": (["report"], "normwise.lab.study.study"),
    "reproduce": (["reproduce", "bn-mnist", "--data", "{dir}/idx"], "normwise.lab.reproduce.specs"),
    "runs list": (["runs", "list"], "normwise.lab.runs.chosen"),
    "runs show": (["runs", "show", "aa"], "normwise.lab.runs.find"),
    "runs export": (["runs", "export", "--csv", "{dir}/runs.csv"], "normwise.lab.runs.chosen"),
}
MODEL = """
import torch
def make():
    return torch.nn.Linear(4, 2), [(torch.randn(8, 4), torch.zeros(8).long())], torch.nn.functional.cross_entropy
"""


@pytest.fixture
def arguments(tmp_path):
    def of(command):
        words = [word.format(dir=tmp_path) for word in CALLS[command][0]]
        return words if command in ("explain", "info") else [*words, "--out", str(tmp_path)]

    (tmp_path / "model.py").write_text(MODEL)
    write_folder(tmp_path / "idx", train=60, test=10)
    identity = {"task": "mlp", "norm": "none", "batch_size": 8, "learning_rate": 0.1, "seed": 0, "steps": 2}
    identity |= {"settings": {}, "source": "", "lab": "", "normwise": "", "torch": "", "backend": "auto"}
    losses = {"train/loss": Series([0, 1], [float("nan"), float("inf")])}
    with Store(tmp_path / "runs.sqlite") as store:
        store.add("aa11", identity, Result("diverged", "the loss", losses))
    return of


@pytest.mark.parametrize("command", CALLS)
def test_ctrl_c_is_130_and_a_fault_of_normwise_is_4(normwise_command, arguments, monkeypatch, command):
    for error, expected, said in ((KeyboardInterrupt, 130, ""), (ZeroDivisionError, 4, "this is a fault of normwise")):
        monkeypatch.setattr(CALLS[command][1], Mock(side_effect=error))
        status, out, err = normwise_command(*arguments(command))
        assert (status, out) == (expected, "")
        assert said in err
        assert ("Traceback" in err) == (expected == 4)


@pytest.mark.parametrize("command", CALLS)
def test_bad_arguments_are_2(normwise_command, arguments, command):
    status, out, err = normwise_command(*arguments(command), "--bogus")
    assert (status, out) == (2, "")
    assert "Traceback" not in err


@pytest.mark.parametrize("command", ["claims", "diagnose", "explain", "info", "runs list", "runs show"])
def test_json_is_strict_and_alone(normwise_command, arguments, command):
    status, out, _ = normwise_command(*arguments(command), "--json")
    assert status == 0
    assert json.loads(out, parse_constant=pytest.fail)


RAISES = {
    "at import": ("raise {error}", ""),
    "in make": ("", "    raise {error}"),
    "in iter": ("class B:\n    def __iter__(self):\n        raise {error}", "    batches = B()"),
    "in next": ("def g():\n    raise {error}\n    yield", "    batches = g()"),
    "in forward": (
        "class M(torch.nn.Linear):\n    def forward(self, x):\n        raise {error}",
        "    model = M(4, 2)",
    ),
    "in backward": ("def hook(gradient):\n    raise {error}", "    model.weight.register_hook(hook)"),
    "in loss": ("def loss(output, target):\n    raise {error}", "    it = loss"),
    "in a loader's worker": (
        "class D(torch.utils.data.Dataset):\n    def __len__(self):\n        return 9\n    def __getitem__(self, i):\n"
        "        raise {error}",
        "    batches = torch.utils.data.DataLoader(D(), num_workers=1)",
    ),
}


@pytest.mark.parametrize("where", RAISES)
def test_what_the_user_s_code_raises_is_3_with_its_traceback(normwise_command, tmp_path, where):
    before, inside = (part.format(error="OSError('disk gone')") for part in RAISES[where])
    (tmp_path / "mine.py").write_text(
        f"import torch\n{before}\ndef make():\n    model, it = torch.nn.Linear(4, 2), torch.nn.CrossEntropyLoss()\n"
        f"    batches = [(torch.randn(8, 4), torch.zeros(8).long())]\n{inside}\n    return model, batches, it\n"
    )
    status, out, err = normwise_command("diagnose", f"{tmp_path}/mine.py:make", "--out", str(tmp_path / "out"))
    assert (status, out) == (3, "")
    trace, _, line = err.partition("normwise: error: ")
    assert trace.startswith("Traceback (most recent call last):\n")
    assert "OSError: disk gone" in trace
    assert "OSError" in line
    assert "disk gone" in err
    assert f'File "{tmp_path}/mine.py", line' in trace
    assert "normwise/cli" not in trace
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "statement",
    [
        "import sys; sys.exit(0)",
        "import sys; sys.exit('no data')",
        "raise EOFError",
        "raise BrokenPipeError(32, 'pipe')",
        "import a_package_that_is_not_there",
        "1 +",
        "raise StopIteration",
    ],
)
def test_no_way_to_raise_is_taken_for_an_end_of_ours(normwise_command, tmp_path, statement):
    (tmp_path / "mine.py").write_text(statement)
    for command in (["diagnose", f"{tmp_path}/mine.py:make"], ["compare", "--task", f"{tmp_path}/mine.py:make"]):
        status, out, err = normwise_command(*command, "--out", str(tmp_path / "out"))
        assert (status, out) == (3, "")
        assert f'{tmp_path}/mine.py", line 1' in err
        assert f"normwise: error: {tmp_path}/mine.py:make raised " in err.splitlines()[-1]


def test_a_layer_of_torch_s_that_raises_is_the_user_s_too(normwise_command, tmp_path):
    (tmp_path / "model.py").write_text(MODEL.replace("Linear(4, 2)", "Linear(5, 2)"))
    status, _, err = normwise_command("diagnose", f"{tmp_path}/model.py:make", "--out", str(tmp_path))
    assert status == 3
    assert "torch/nn/modules/linear.py" in err
    assert "normwise: error: the model raised RuntimeError in" in err


UNCALLABLE = """
from normwise.lab.tasks import Task
import torch
def args(n, m=1, *more, k): pass
def fine(*args, **kwargs): return kwargs.get("n")
fromhex = bytes.fromhex
class Unfinished(Task):
    name, summary, norms = "unfinished", "", ("none",)
    def data(self): ...
class Slip(Unfinished):
    def model(self, norm): ...
class NoSelf(Unfinished):
    def model(): ...
value = 3
"""


@pytest.mark.parametrize(
    ("command", "function", "says"),
    [
        ("diagnose", "args", ":args takes arguments (n, k), and is called without any: give them defaults, or name a"),
        ("compare", "args", ":args takes arguments (n, k), and is called without any: give them defaults, or name a"),
        ("diagnose", "fine", ":fine returned NoneType: expected (model, batches, loss)"),
        ("compare", "Unfinished", ":Unfinished is a class without model: it must define them"),
        ("compare", "Slip", ":Slip: model of Slip is called as task.model(norm, seed): too many positional arguments"),
        ("compare", "NoSelf", ":NoSelf: model of NoSelf is called as task.model(norm, seed): invalid method signature"),
        ("diagnose", "value", "no function 'value' in this file, where it is int (3); it has args, fine, Unfinished,"),
        ("diagnose", "ags", "no function 'ags' in this file; did you mean 'args'?"),
        ("compare", "make_it", "no function 'make_it' in this file; it has args, fine, Unfinished, Slip, NoSelf"),
    ],
)
def test_a_function_that_cannot_be_called_is_no_fault_of_ours(normwise_command, tmp_path, command, function, says):
    (tmp_path / "mine.py").write_text(UNCALLABLE)
    words = ["compare", "--quick", "--task"] if command == "compare" else [command]
    status, out, err = normwise_command(*words, f"{tmp_path}/mine.py:{function}", "--out", str(tmp_path / "out"))
    assert (status, out) == (2, "")
    assert says in err
    assert "Traceback" not in err


TASK = """
import atexit, os, subprocess, sys
import torch
from normwise.lab.tasks import Batch, Task

def noise():
    print("noise")
    sys.stdout.flush()
    print("noise", file=sys.__stdout__)
    os.write(1, b"noise\\n")
    subprocess.run([sys.executable, "-c", "print('noise')"])

if not RAISES:
    noise()
    atexit.register(noise)

class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        os.write(1, b"noise\\n")
        print("noise", flush=True)
        return torch.randn(4), torch.tensor(index % 2)

class Net(torch.nn.Linear):
    def forward(self, x):
        os.write(1, b"noise\\n")
        print("noise")
        return super().forward(x)

class Noisy(Task):
    name, summary, norms = "noisy", "", ("none",)
    def data(self):
        return Batch(torch.randn(8, 4), torch.zeros(8).long()), Batch(torch.randn(8, 4), torch.zeros(8).long())
    def model(self, norm, seed):
        if RAISES:
            raise ValueError("of the task")
        noise()
        return Net(4, 2)

def make():
    return Net(4, 2), torch.utils.data.DataLoader(Data(), 8, num_workers=1), torch.nn.functional.cross_entropy
"""


def script(*words):
    program = "from normwise.cli.main import main; main()"
    return subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, timeout=200)


@pytest.mark.skipif(os.name == "nt", reason="a child inherits no descriptors there")
@pytest.mark.parametrize("words", [["diagnose", "{0}:make"], ["compare", "--task", "{0}:Noisy", "--jobs", "2"]])
def test_under_json_what_the_user_s_code_prints_goes_to_stderr(tmp_path, words):
    """By print, on the descriptor, from child processes and workers, and after the document."""
    (tmp_path / "noisy.py").write_text(TASK.replace("RAISES", "False"))
    small = ["--steps", "1", "--seeds", "2", "--lr", "0.1", "--batch-sizes", "4"] if words[0] == "compare" else []
    words = [word.format(tmp_path / "noisy.py") for word in words]
    ran = script(*words, *small, "--out", str(tmp_path), "--json")
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout, parse_constant=pytest.fail)
    assert ran.stderr.count("noise") > 10


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_what_a_task_raises_is_3_in_a_worker_as_well(normwise_command, tmp_path, jobs):
    (tmp_path / "noisy.py").write_text(TASK.replace("RAISES", "True"))
    small = ["--steps", "1", "--seeds", "2", "--lr", "0.1", "--batch-sizes", "4", "--jobs", jobs]
    status, _, err = normwise_command("compare", "--task", f"{tmp_path}/noisy.py:Noisy", *small, "--out", str(tmp_path))
    assert status == 3
    trace = err[err.index("Traceback") :]
    assert trace.count("Traceback") == 1
    assert trace.splitlines()[1].startswith(f'  File "{tmp_path}/noisy.py", line')
    assert trace.endswith(f"normwise: error: {tmp_path}/noisy.py:Noisy raised ValueError: of the task\n")
