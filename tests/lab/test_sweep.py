from __future__ import annotations

import pickle
import subprocess
import sys

import pytest
import torch

from normwise.lab import sweep as module
from normwise.lab.cluster import Ran
from normwise.lab.errors import LabError
from normwise.lab.run import Result, Series
from normwise.lab.spec import expand
from normwise.lab.store import Store
from normwise.lab.sweep import cores, sweep

SPECS = expand("mlp", seeds=2, norms=["batch", "layer"], batch_sizes=[8], learning_rates=[0.1], steps=4)


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "runs.sqlite") as opened:
        yield opened


def numbers(store, specs=SPECS):
    return [
        {name: curve for name, curve in run.series.items() if name != "time/step"}
        for run in store.runs(spec.key() for spec in specs)
    ]


def test_nothing_is_trained_twice(store):
    ran = []
    sweep(SPECS[:3], store, jobs=1, finished=lambda spec, _: ran.append(spec))
    assert sorted(ran, key=SPECS.index) == SPECS[:3]
    ran.clear()
    sweep(SPECS, store, jobs=1, finished=lambda spec, _: ran.append(spec))
    assert ran == SPECS[3:]


def test_workers_give_the_numbers_that_one_process_gives(store, tmp_path):
    threads = torch.get_num_threads()
    sweep(SPECS, store, jobs=1, finished=lambda *_: None)
    assert torch.get_num_threads() == threads
    with Store(tmp_path / "other.sqlite") as other:
        sweep(SPECS, other, jobs=2, finished=lambda *_: None)
        assert numbers(other) == numbers(store)
    assert len(numbers(store)) == len(SPECS)


def test_an_interrupt_keeps_what_is_finished(store):
    def interrupt(*_):
        if len(store.keys()) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(SPECS, store, jobs=1, finished=interrupt)
    assert len(store.keys()) == 2


def test_whole_seeds_come_first_and_the_order_is_fixed(monkeypatch):
    monkeypatch.setattr("os.getpid", lambda: 1)  # which seeds the order: with some numbers one size comes late
    specs = expand("cnn", seeds=3)
    order = module._in_order(specs)
    assert [spec.seed for spec in order] == sorted(spec.seed for spec in specs)
    assert order == module._in_order(specs)
    assert set(order) == set(specs)
    sizes = [spec.batch_size for spec in order[:12]]
    assert len(set(sizes)) == 3  # long and short runs are mixed


def test_a_file_that_changes_meanwhile_stops_the_sweep(store, monkeypatch):
    monkeypatch.setattr(module, "_run", lambda key, *_: Ran(key, "another key", Result("done"), "here"))
    with pytest.raises(LabError, match="mlp: the file changed while the sweep ran"):
        sweep(SPECS, store, jobs=1, finished=lambda *_: None)
    assert store.keys() == set()


def test_cores_is_what_this_process_may_use():
    assert cores() >= 1


def test_what_another_sweep_stores_meanwhile_is_not_trained(store, tmp_path):
    ran = []

    def finished(spec, result):
        ran.append((spec, result is not None))
        with Store(tmp_path / "runs.sqlite") as other:
            for theirs in SPECS:
                other.add(theirs.key(), theirs.identity(), Result("done", "", {"x": Series([0], [1.0])}))

    sweep(SPECS, store, jobs=1, finished=finished)
    assert [spec for spec, trained in ran if trained] == [ran[0][0]]
    assert sorted((spec for spec, _ in ran), key=SPECS.index) == SPECS  # each is reported once
    assert "train/loss" in store.runs([ran[0][0].key()])[0].series


def test_two_sweeps_at_once_do_each_run_about_once(tmp_path):
    # The numbers seed the orders of the two. Those of 1 and 2 begin each seed with another run; of any two processes
    # one pair in sixty begins so often with the same that nearly all is done twice.
    program = """
import os
import sys
from pathlib import Path
from normwise.lab import sweep
from normwise.lab.spec import expand
from normwise.lab.store import Store
os.getpid = lambda: int(sys.argv[2])
specs = expand("mlp", seeds=4, norms=["batch", "layer", "rms"], batch_sizes=[8], learning_rates=[0.1], steps=40)
with Store(Path(sys.argv[1])) as store:
    ran = []
    sweep.sweep(specs, store, jobs=1, finished=lambda spec, result: ran.append(result is not None))
    print(len(ran), sum(ran), len(store.keys()))
"""
    path = tmp_path / "shared.sqlite"
    both = [subprocess.Popen([sys.executable, "-c", program, path, i], stdout=subprocess.PIPE, text=True) for i in "12"]
    printed = [list(map(int, process.communicate(timeout=120)[0].split())) for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert max(stored for *_, stored in printed) == 12
    # Whichever came first may have done them all; both together did few twice: at most the two that run at once.
    assert 12 <= sum(trained for _, trained, _ in printed) <= 20


def test_a_worker_that_dies_is_an_error_and_what_was_finished_is_kept(tmp_path):
    (tmp_path / "deadly.py").write_text(DEADLY)
    specs = expand(
        f"{tmp_path}/deadly.py:make", seeds=6, norms=["none"], batch_sizes=[4], learning_rates=[0.1], steps=2
    )
    with Store(tmp_path / "runs.sqlite") as store:
        with pytest.raises(RuntimeError, match="a worker process died while it trained"):
            sweep(specs, store, jobs=2, finished=lambda *_: None)
        assert store.keys() < {spec.key() for spec in specs}


def test_an_error_that_cannot_leave_a_worker_is_told_by_its_text(tmp_path):
    (tmp_path / "odd.py").write_text(
        "from normwise.lab.tasks.mlp import Mlp\n"
        "class OddError(Exception):\n    def __init__(self, code, text):\n        super().__init__(text)\n"
        "class Odd(Mlp):\n    name = 'odd'\n    def model(self, norm, seed):\n        raise OddError(5, 'of it')\n"
    )
    (spec,) = expand(f"{tmp_path}/odd.py:Odd", seeds=1, norms=["none"], batch_sizes=[4], learning_rates=[0.1])
    with pytest.raises(RuntimeError, match="OddError: of it") as caught:
        module._run(spec.key(), spec, None)
    assert str(pickle.loads(pickle.dumps(caught.value))) == "OddError: of it"
    # Its own error is told as the cause, except where causes are pickled, which importing Dask sets up.
    cause = caught.value.__cause__
    assert type(cause).__name__ == "OddError" or (cause is None and "distributed" in sys.modules)


DEADLY = """
import os
import torch
from normwise.lab.tasks import Batch, Task

class Deadly(Task):
    name, summary, norms = "deadly", "", ("none",)
    def data(self):
        return Batch(torch.randn(8, 3), torch.zeros(8).long()), Batch(torch.randn(8, 3), torch.zeros(8).long())
    def model(self, norm, seed):
        if seed == 3:
            os.kill(os.getpid(), 9)
        return torch.nn.Linear(3, 2)

make = Deadly
"""
