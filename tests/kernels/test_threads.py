"""Layers trained from several Python threads at once, and after a fork: results as when they run alone."""

from __future__ import annotations

import os
import sys
import threading
import time

import pytest
import torch
from torch import Tensor, nn

import normwise
from normwise.backends.cpu import library, norms

# Above the size from which kernels ask for more than one thread.
SAMPLES = {
    "batch norm": (lambda: normwise.BatchNorm2d(16, act="relu"), (8, 16, 20, 20)),
    "batch norm of rows": (lambda: normwise.BatchNorm1d(64, track_running_stats=False), (1024, 64)),
    "layer norm": (lambda: normwise.LayerNorm(512), (128, 512)),
    "group norm": (lambda: normwise.GroupNorm(4, 16), (8, 16, 20, 20)),
    "lstm": (lambda: normwise.LSTM(24, 40), (12, 9, 24)),
    "gru": (lambda: normwise.GRU(24, 40, bidirectional=True), (12, 9, 24)),
    "lstm, bfloat16": (lambda: normwise.LSTM(24, 40, dtype=torch.bfloat16), (12, 9, 24)),
}


def trained(layer: nn.Module, x: Tensor, upstream: Tensor) -> list[Tensor]:
    """The output and all gradients."""
    output = layer(x)
    output = output[0] if isinstance(output, tuple) else output
    return [output.detach(), *torch.autograd.grad(output, [x, *layer.parameters()], upstream)]


def samples() -> list[tuple[nn.Module, Tensor, Tensor]]:
    found = []
    for make, shape in SAMPLES.values():
        layer = make()
        x = torch.randn(shape, dtype=next(layer.parameters(), torch.empty(0)).dtype, requires_grad=True)
        output = layer(x)
        found.append((layer, x, torch.randn_like(output[0] if isinstance(output, tuple) else output)))
    return found


@pytest.mark.parametrize("threads", [1, 2])
def test_several_python_threads_at_once(threads: int) -> None:
    torch.set_num_threads(threads)
    every = samples()
    alone = [trained(*sample) for sample in every]
    faults: list[str] = []

    def work(first: int) -> None:
        torch.set_num_threads(threads)  # a thread starts with the default
        for k in range(3 * len(every)):
            n = (first + k) % len(every)
            try:
                same = all(map(torch.equal, trained(*every[n]), alone[n]))
            except Exception as error:
                faults.append(repr(error))
                return
            if not same:
                faults.append(f"{list(SAMPLES)[n]} differs")

    workers = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not faults


def test_python_threads_run_while_a_kernel_does() -> None:
    """Nobody may take the GIL away here, so others run only where it is let go: in between, by the kernel alone."""
    x, stats = torch.randn(2, 64, 1 << 16), torch.empty(2, 64, dtype=torch.float64)
    pointers = x[0].data_ptr(), *[0] * 6, x[1].data_ptr(), *(t.data_ptr() for t in stats)
    arguments = norms.ROWS_FORWARD.pack(*pointers, 64, 1 << 16, 64, 1e-5, 0, 1, 0, 1, 0, 0)
    call = library.functions.nw_rows_forward
    call(arguments)
    ran, done = [0], threading.Event()

    def work() -> None:
        while not done.is_set():
            ran[0] += 1
            time.sleep(1e-4)

    worker, interval = threading.Thread(target=work), sys.getswitchinterval()
    sys.setswitchinterval(1000.0)
    try:
        worker.start()
        before = ran[0]
        for _ in range(100):
            call(arguments)
            if ran[0] > before:
                break
        meanwhile = ran[0] - before
    finally:
        sys.setswitchinterval(interval)
        done.set()
        worker.join()
    assert meanwhile > 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_trains_on_one_thread() -> None:
    """As torch: a child such as a DataLoader's worker may go on with one thread."""
    torch.set_num_threads(1)
    every = samples()
    alone = [trained(*sample) for sample in every]
    child = os.fork()
    if child == 0:
        status = 1
        try:
            again = [trained(*sample) for sample in every]
            status = 0 if all(all(map(torch.equal, *pair)) for pair in zip(again, alone, strict=True)) else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
