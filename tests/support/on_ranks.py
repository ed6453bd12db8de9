"""Runs a function of a test file on several ranks: one process each, connected by gloo.

The processes are forked from a server that has imported torch once, so that a test with four of them takes a fraction
of a second.
"""

from __future__ import annotations

import datetime
import importlib.util
import multiprocessing
import pickle
import sys
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

SERVER = multiprocessing.get_context("forkserver")
# What the first torch.autograd.grad, DistributedDataParallel and checkpoint import, half a second each.
SERVER.set_forkserver_preload(["normwise", "pytest", "torch.fx.experimental.symbolic_shapes", "torch._dynamo"])


def on_ranks(size: int, function: Callable[..., Any], *args: Any, timeout: float = 60.0) -> list[Any]:
    """`function(*args)` on each of `size` ranks in a process group of their own: the results, in the order of ranks.

    A rank that raises fails the test with its traceback; a rank that dies without a word has the result None.
    `timeout`, in seconds, is that of the process group.
    """
    file = sys.modules[function.__module__].__file__
    assert file is not None
    with tempfile.TemporaryDirectory() as folder:
        ends = [SERVER.Pipe(duplex=False) for _ in range(size)]
        settings = (size, Path(folder) / "store", timeout, file, function.__name__, args)
        processes = [SERVER.Process(target=_rank, args=(r, ends[r][1], *settings), daemon=True) for r in range(size)]
        for process in processes:
            process.start()
        for _, writer in ends:
            writer.close()  # the rank holds the only other end, so that its death can be read
        try:
            answers = [_answer(reader, timeout + 30) for reader, _ in ends]
        finally:
            for process in processes:
                process.kill()
                process.join()
    faults = [f"rank {r}:\n{text}" for r, (text, _) in enumerate(answers) if text is not None]
    assert not faults, "\n".join(faults)
    return [result for _, result in answers]


def _answer(reader: Connection, seconds: float) -> tuple[str | None, Any]:
    if not wait([reader], seconds):
        return f"no answer within {seconds} s", None
    try:
        return pickle.loads(reader.recv_bytes())  # type: ignore[no-any-return]
    except EOFError:
        return None, None


def _rank(
    rank: int, writer: Connection, size: int, store: Path, timeout: float, file: str, name: str, args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=size,
            timeout=datetime.timedelta(seconds=timeout),
        )
        spec = importlib.util.spec_from_file_location(Path(file).stem, file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        answer = None, getattr(module, name)(*args)
    except BaseException:
        answer = traceback.format_exc(), None
    # By value: what `send` does with a tensor needs this process to live on.
    writer.send_bytes(pickle.dumps(answer))
