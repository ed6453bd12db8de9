"""Run many specs, over all cores or a Dask cluster, storing each as it is finished.

Every run has a process and one thread to itself: two cores train two nets in the time of one, and one thread makes
the order of sums, and so every number, independent of how many workers there are. Workers only compute; the process
that called ``sweep`` alone writes the store.
"""

from __future__ import annotations

import os
import pickle
import random
import signal
import threading
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path

import joblib
import torch
from joblib.externals.loky import get_reusable_executor

from normwise.lab.checkpoint import checkpoint_of
from normwise.lab.cluster import Ran, on_cluster
from normwise.lab.errors import LabError, WorkerError
from normwise.lab.run import Result, run
from normwise.lab.spec import Spec
from normwise.lab.store import Store, this_machine
from normwise.lab.tasks import is_own, load_task


def cores() -> int:
    """The cores that this process may use; its affinity and its container's limit count."""
    return int(joblib.cpu_count())


def sweep(
    specs: Sequence[Spec],
    store: Store,
    *,
    jobs: int,
    finished: Callable[[Spec, Result | None], None],
    scheduler: str | None = None,
    checkpoints: Path | None = None,
) -> None:
    """Train what the store does not have yet.

    Another sweep may use the same store at the same time: what one has stored, the other no longer starts.
    KeyboardInterrupt stops the workers and passes on; what is stored stays.

    Args:
        specs: the runs.
        store: where they go.
        jobs: how many processes on this machine; of no matter with a scheduler.
        finished: called after each run is stored; with None for one that another sweep has stored meanwhile.
        scheduler: the address of a Dask scheduler, whose workers train instead.
        checkpoints: a folder where runs keep how far they are; started again, they go on from there.

    Raises:
        LabError: a task's file changed while the sweep ran, or a worker of the cluster has another one or other
            versions; the scheduler does not answer or has no workers.
        WorkerError: a worker died of a run.
    """
    for task in dict.fromkeys(spec.task for spec in specs):
        if is_own(task):
            store.note_reference(load_task(task).source, task)
    stored = store.keys()
    waiting = {key: spec for spec in _in_order(specs) if (key := spec.key()) not in stored}
    elsewhere: list[Spec] = []

    def missing() -> Iterator[tuple[str, Spec]]:
        """What to start next, asked for as late as can be: another sweep may have stored it by then."""
        for key, spec in waiting.items():
            if store.has(key):
                elsewhere.append(spec)
            else:
                yield key, spec

    if scheduler is None:
        results = _on_cores(missing(), min(jobs, len(waiting)), checkpoints)
    else:
        results = on_cluster(missing(), _run, checkpoints, scheduler)
    try:
        for ran in results if waiting else ():
            spec = waiting[ran.key]
            if ran.key_there != ran.key:
                raise LabError(_changed(spec, ran, scheduler))
            store.add(ran.key, spec.identity(), ran.result, machine=ran.machine)
            if checkpoints is not None:
                checkpoint_of(ran.key, checkpoints).unlink(missing_ok=True)
            finished(spec, ran.result)
            while elsewhere:
                finished(elsewhere.pop(), None)
    finally:
        results.close()
    while elsewhere:
        finished(elsewhere.pop(), None)


def _in_order(specs: Sequence[Spec]) -> list[Spec]:
    """Seed by seed, so that a stopped sweep has whole seeds; within a seed in a random order, so that short and long
    runs are mixed and the time left can be told from the runs done. The order is this process's own: two sweeps on
    one store seldom train the same run at the same time."""
    mixed = random.Random(os.getpid()).sample(specs, len(specs))
    return sorted(mixed, key=lambda spec: spec.seed)


def _changed(spec: Spec, ran: Ran, scheduler: str | None) -> str:
    if scheduler is None:
        return f"{spec.task}: the file changed while the sweep ran; start it again"
    return (
        f"{spec.task}: the worker on {ran.machine} has another file, other data or other versions of normwise and "
        "torch than this process; give both the same and start again"
    )


# Runs share torch's random state and number of threads, and a Dask worker may have several threads.
_ONE_AT_A_TIME = threading.Lock()


def _run(key: str, spec: Spec, checkpoints: Path | None) -> Ran:
    """What a worker does."""
    with _ONE_AT_A_TIME:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            checkpoint = None if checkpoints is None else checkpoint_of(key, checkpoints)
            return Ran(key, spec.key(), run(spec, checkpoint), this_machine())
        except Exception as error:
            raised = error
        finally:
            torch.set_num_threads(threads)
    if _can_travel(raised):
        raise raised
    # Not inside of `except`: what pickles an error's context as well, as Dask's workers do, would fail on that.
    told = RuntimeError(f"{type(raised).__name__}: {raised}")
    told.__cause__ = raised
    if not _can_travel(told):
        told.__cause__ = None
    raise told


def _can_travel(error: Exception) -> bool:
    """Whether it survives the way out of a worker: a class whose arguments are not those of its base does not."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return False
    return True


def _on_cores(tasks: Iterator[tuple[str, Spec]], jobs: int, checkpoints: Path | None) -> Generator[Ran, None, None]:
    """The results by joblib, as they come; with one job in this process. A task is taken when a worker is free."""
    with joblib.parallel_config("loky", inner_max_num_threads=1):
        parallel = joblib.Parallel(
            jobs, return_as="generator_unordered", batch_size=1, pre_dispatch="n_jobs", max_nbytes=None
        )
        with _interrupts_ignored():
            results = parallel(joblib.delayed(_run)(key, spec, checkpoints) for key, spec in tasks)
    try:
        for ran in results:  # noqa: UP028 (`yield from` would close them before their warning is silenced)
            yield ran
    except BrokenProcessPool as error:
        raise WorkerError(
            "a worker process died while it trained (killed for memory, or a crash in compiled code). What was "
            "finished is stored; start again to go on, with --jobs 1 to see where it dies."
        ) from error
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # joblib warns that what is stopped was not finished
            results.close()
        if jobs > 1:
            get_reusable_executor().shutdown(kill_workers=True)


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Processes started inside ignore Ctrl-C, which a terminal sends to all: the parent alone decides what it means."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
