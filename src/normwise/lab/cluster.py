"""Runs on the workers of a Dask cluster (the extra ``normwise[cluster]``).

Dask is used directly and not through joblib: a run's key is also the name of its task, so two sweeps on one cluster
share it; and joblib's own Dask backend waits for ever for a run that kills every worker.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Generator, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from normwise.lab.errors import LabError, WorkerError
from normwise.lab.run import Result
from normwise.lab.spec import Spec

if TYPE_CHECKING:
    from distributed import Client

CONNECT_SECONDS = 5
POLL_SECONDS = 10
AHEAD = 2
"""Runs that are with the cluster, for each worker: one that trains and one that waits, so that no worker does."""


class Ran(NamedTuple):
    """What a worker sends back. ``key_there`` is the run's key where it ran; another one means another run."""

    key: str
    key_there: str
    result: Result
    machine: str


def on_cluster(
    tasks: Iterator[tuple[str, Spec]],
    run: Callable[[str, Spec, Path | None], Ran],
    checkpoints: Path | None,
    address: str,
) -> Generator[Ran, None, None]:
    """The results as they come. A run whose worker is lost is given to another one, as often as Dask's setting
    ``distributed.scheduler.allowed-failures`` says (three times).

    Raises:
        LabError: the scheduler does not answer, or has no workers (any more).
        WorkerError: a run was lost with every worker that it was given to.
    """
    from distributed import CancelledError, Future, KilledWorker

    client = _connect(address)
    done: queue.SimpleQueue[Future] = queue.SimpleQueue()
    pending: dict[str, Future] = {}
    try:
        while True:
            free = AHEAD * len(client.nthreads()) - len(pending)
            for key, spec in islice(tasks, max(0, free)):
                future = client.submit(run, key, spec, checkpoints, key=f"normwise-{key}")
                pending[future.key] = future
                future.add_done_callback(done.put)
            if not pending and free > 0:
                return
            try:
                future = done.get(timeout=POLL_SECONDS)
            except queue.Empty:
                if not client.nthreads():
                    raise LabError(f"the scheduler at {address} has lost all its workers. {_WORKERS}") from None
                continue
            yield pending.pop(future.key).result()
    except KilledWorker as error:
        raise WorkerError(
            f"a run was lost with every worker that it was given to ({error}): killed for memory, or a crash in "
            "compiled code. What was finished is stored; start again to go on."
        ) from error
    except (CancelledError, OSError) as error:
        raise LabError(
            f"the scheduler at {address} is gone ({error}). What was finished is stored; start it and this again."
        ) from error
    finally:
        client.cancel(list(pending.values()))
        client.close()


_WORKERS = "Start some with: dask worker ADDRESS --nworkers N --nthreads 1. What was finished is stored."


def _connect(address: str) -> Client:
    from distributed import Client

    try:
        client = Client(address, timeout=CONNECT_SECONDS, set_as_default=False, name="normwise")
    except (OSError, ValueError) as error:
        raise LabError(
            f"no Dask scheduler answers at {address!r} ({_reason(error)}). Start one with: dask scheduler; it prints "
            "its address. Without --scheduler the runs use this machine's cores."
        ) from error
    try:
        client.wait_for_workers(1, timeout=CONNECT_SECONDS)
    except TimeoutError:
        client.close()
        raise LabError(f"the Dask scheduler at {address} has no workers. {_WORKERS}") from None
    return client


def _reason(error: Any) -> str:
    """The innermost cause, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}".splitlines()[0]
