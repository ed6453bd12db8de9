"""Run many specs over all cores, storing each as it is finished.

Every worker is a fresh process with one thread: two cores train two nets in the time of one, and one thread makes
the order of sums, and so every number, independent of how many workers there are.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

import torch

from normwise.lab.errors import LabError
from normwise.lab.run import Result, run
from normwise.lab.spec import Spec
from normwise.lab.store import Store


def cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def sweep(specs: Sequence[Spec], store: Store, *, jobs: int, finished: Callable[[Spec, Result], None]) -> None:
    """Train what the store does not have yet; ``finished`` is called after each run is stored.

    KeyboardInterrupt stops the workers and passes on; what is stored stays.

    Raises:
        LabError: a task's file changed while the sweep ran.
    """
    stored = store.keys()
    waiting = {key: spec for spec in _in_order(specs) if (key := spec.key()) not in stored}
    workers = min(jobs, len(waiting))
    results = _in_process(waiting) if workers <= 1 else _in_workers(waiting, workers)
    for key, (ran, result) in results:
        spec = waiting[key]
        if ran != key:
            raise LabError(f"{spec.task}: the file changed while the sweep ran; start it again")
        store.add(key, spec.identity(), result)
        finished(spec, result)


def _in_order(specs: Sequence[Spec]) -> list[Spec]:
    """Seed by seed, so that a stopped sweep has whole seeds; within a seed in a fixed random order, so that short and
    long runs are mixed and the time left can be told from the runs done."""
    mixed = random.Random(0).sample(specs, len(specs))
    return sorted(mixed, key=lambda spec: spec.seed)


Results = Iterator[tuple[str, tuple[str, Result]]]


def _run(spec: Spec) -> tuple[str, Result]:
    return spec.key(), run(spec)


def _in_process(waiting: dict[str, Spec]) -> Results:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for key, spec in waiting.items():
            yield key, _run(spec)
    finally:
        torch.set_num_threads(threads)


def _in_workers(waiting: dict[str, Spec], workers: int) -> Results:
    # "spawn", because a fork of a process whose torch already has threads may hang.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=torch.set_num_threads, initargs=(1,))
    try:
        with _interrupts_ignored():
            futures = {pool.submit(_run, spec): key for key, spec in waiting.items()}
        for future in as_completed(futures):
            yield futures.pop(future), future.result()
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a worker process died while it trained (killed for memory, or a crash in compiled code). What was "
            "finished is stored; start again to go on, with --jobs 1 to see where it dies."
        ) from error
    except BaseException:
        # Not pool.shutdown alone: it would wait for the runs that have begun.
        for process in list(pool._processes.values()):
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Processes started inside ignore Ctrl-C, which a terminal sends to all: the parent alone decides what it means."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
