"""Sweeps on a Dask cluster of separate processes on this machine."""

from __future__ import annotations

import os
import signal
import socket
import time

import pytest

distributed = pytest.importorskip("distributed", reason="the extra normwise[cluster] is not installed")
dask = pytest.importorskip("dask")

from normwise.lab import cluster as module  # noqa: E402
from normwise.lab.errors import LabError  # noqa: E402
from normwise.lab.spec import expand  # noqa: E402
from normwise.lab.store import Store  # noqa: E402
from normwise.lab.sweep import sweep  # noqa: E402

# What Dask leaves open when its processes are killed is its own matter.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
SPECS = expand("mlp", seeds=6, norms=["batch", "layer"], batch_sizes=[8], learning_rates=[0.1], steps=60)


@pytest.fixture(scope="module")
def cluster():
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0", memory_limit=0
    ) as made:
        yield made


def numbers(store):
    return [
        {name: curve for name, curve in run.series.items() if name != "time/step"}
        for run in store.runs(spec.key() for spec in SPECS)
    ]


def test_a_worker_killed_in_mid_run_costs_nothing_and_doubles_nothing(cluster, tmp_path):
    reported, killed = [], []

    def finished(spec, result):
        reported.append(spec)
        if len(reported) == 3:
            with distributed.Client(cluster.scheduler_address, set_as_default=False) as client:
                pids = client.run(os.getpid)
            killed.append(min(pids.values()))
            os.kill(killed[0], signal.SIGKILL)

    with Store(tmp_path / "cluster.sqlite") as store:
        sweep(SPECS, store, jobs=1, finished=finished, scheduler=cluster.scheduler_address)
        assert killed
        assert sorted(reported, key=SPECS.index) == SPECS
        found = numbers(store)
        runs = store.runs(store.keys())
    assert all(run.status == "done" for run in runs)
    with Store(tmp_path / "here.sqlite") as here:
        sweep(SPECS[:2], here, jobs=1, finished=lambda *_: None)
        assert found[:2] == numbers(here)


def test_an_error_of_a_run_passes_on_and_the_cluster_stays(cluster, tmp_path):
    (tmp_path / "faulty.py").write_text(
        "from normwise.lab.tasks.mlp import Mlp\n"
        "class Faulty(Mlp):\n"
        "    name = 'faulty'\n"
        "    def model(self, norm, seed):\n"
        "        raise ZeroDivisionError('of the task')\n"
    )
    specs = expand(f"{tmp_path}/faulty.py:Faulty", seeds=2, norms=["none"])
    with Store(tmp_path / "runs.sqlite") as store:
        with pytest.raises(ZeroDivisionError, match="of the task"):
            sweep(specs, store, jobs=1, finished=lambda *_: None, scheduler=cluster.scheduler_address)
        sweep(SPECS[:1], store, jobs=1, finished=lambda *_: None, scheduler=cluster.scheduler_address)
        assert store.keys() == {SPECS[0].key()}


def test_a_worker_with_another_file_is_named(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr("normwise.__version__", "0.0.0")  # of this process alone
    with Store(tmp_path / "runs.sqlite") as store:
        with pytest.raises(LabError, match=r"mlp: the worker on .* has another file, other data or other versions"):
            sweep(SPECS[:1], store, jobs=1, finished=lambda *_: None, scheduler=cluster.scheduler_address)
        assert store.keys() == set()


def test_a_scheduler_that_is_not_there_is_an_error_within_seconds(tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{unused.getsockname()[1]}"
        start = time.perf_counter()
        with (
            Store(tmp_path / "runs.sqlite") as store,
            pytest.raises(
                LabError, match=rf"no Dask scheduler answers at '{address}' .*Start one with: dask scheduler"
            ),
        ):
            sweep(SPECS, store, jobs=1, finished=lambda *_: None, scheduler=address)
    assert time.perf_counter() - start < 20


@pytest.mark.parametrize("address", ["nonsense://x", "tcp://no-such-host.invalid:8786"])
def test_an_address_that_is_none_is_named(address, tmp_path):
    with Store(tmp_path / "runs.sqlite") as store, pytest.raises(LabError, match="no Dask scheduler answers at"):
        sweep(SPECS, store, jobs=1, finished=lambda *_: None, scheduler=address)


def test_a_scheduler_without_workers_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CONNECT_SECONDS", 1)
    with (
        distributed.LocalCluster(n_workers=0, dashboard_address=":0") as empty,
        Store(tmp_path / "runs.sqlite") as store,
        pytest.raises(LabError, match=r"has no workers. Start some with: dask worker"),
    ):
        sweep(SPECS, store, jobs=1, finished=lambda *_: None, scheduler=empty.scheduler_address)


def test_a_run_that_kills_its_workers_ends_the_sweep(tmp_path):
    (tmp_path / "deadly.py").write_text(
        "import os\n"
        "from normwise.lab.tasks.mlp import Mlp\n"
        "class Deadly(Mlp):\n"
        "    name = 'deadly'\n"
        "    def model(self, norm, seed):\n"
        "        os.kill(os.getpid(), 9)\n"
    )
    specs = expand(f"{tmp_path}/deadly.py:Deadly", seeds=1, norms=["none"], batch_sizes=[8], learning_rates=[0.1])
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 0}),
        distributed.LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=":0", memory_limit=0) as made,
        Store(tmp_path / "runs.sqlite") as store,
    ):
        sweep(SPECS[:1], store, jobs=1, finished=lambda *_: None, scheduler=made.scheduler_address)
        with pytest.raises(RuntimeError, match="a run was lost with every worker that it was given to"):
            sweep(specs, store, jobs=1, finished=lambda *_: None, scheduler=made.scheduler_address)
        assert store.keys() == {SPECS[0].key()}
