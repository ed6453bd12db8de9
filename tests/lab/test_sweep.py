from __future__ import annotations

import pytest
import torch

from normwise.lab import sweep as module
from normwise.lab.errors import LabError
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


def test_whole_seeds_come_first_and_the_order_is_fixed():
    specs = expand("cnn", seeds=3)
    order = module._in_order(specs)
    assert [spec.seed for spec in order] == sorted(spec.seed for spec in specs)
    assert order == module._in_order(specs)
    assert set(order) == set(specs)
    sizes = [spec.batch_size for spec in order[:12]]
    assert len(set(sizes)) == 3  # long and short runs are mixed


def test_a_file_that_changes_meanwhile_stops_the_sweep(store, monkeypatch):
    monkeypatch.setattr(module, "_run", lambda spec: ("another key", None))
    with pytest.raises(LabError, match="mlp: the file changed while the sweep ran"):
        sweep(SPECS, store, jobs=1, finished=lambda *_: None)
    assert store.keys() == set()


def test_cores_is_what_this_process_may_use():
    assert cores() >= 1
