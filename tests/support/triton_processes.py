"""Launches whose programs wait for one another, by Triton's interpreter: a process for each program, over memory that
they share. The interpreter's atomic operations are the processor's own.

What it does not show is a GPU's memory order: a processor's is stricter.
"""

from __future__ import annotations

import faulthandler
import gc
import mmap
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import Any
from unittest import mock

import numpy
import torch
from torch import Tensor


class Launch:
    """One launch of a kernel with its tensors, on which it is not run yet."""

    def __init__(self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.kernel, self.grid, self.kwargs = kernel, grid, kwargs
        self.own = args
        self.args = [_shared(t) if isinstance(t, Tensor) else t for t in args]

    def collect(self, into: tuple[Any, ...] | None = None) -> None:
        """Copy what the processes wrote to where the caller of the kernel looks for it, or into another call's."""
        for own, shared in zip(self.own if into is None else into, self.args, strict=True):
            if isinstance(own, Tensor):
                own.copy_(shared)

    def again(self) -> Launch:
        """The same launch, on tensors of its own."""
        return Launch(self.kernel, self.grid, self.own, self.kwargs)


def _shared(t: Tensor) -> Tensor:
    memory = mmap.mmap(-1, max(t.numel(), 1) * t.element_size())
    return torch.frombuffer(memory, dtype=t.dtype)[: t.numel()].view(t.shape).copy_(t)


@contextmanager
def _in_place_of(module: ModuleType, name: str, launch: Callable[..., None]) -> Iterator[None]:
    """Of the launches of the module's kernel: `launch(grid, args, kwargs)`."""

    class Launcher:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *args, **kwargs: launch(grid, args, kwargs)

    with mock.patch.object(module, name, Launcher()):
        yield


@contextmanager
def recorded(module: ModuleType, name: str) -> Iterator[list[Launch]]:
    """Launches of the module's kernel are listed instead of made."""
    launches: list[Launch] = []
    kernel = getattr(module, name)
    with _in_place_of(module, name, lambda grid, *given: launches.append(Launch(kernel, grid, *given))):
        yield launches


class _Recorded(Exception):
    """A call has come to its launch."""


def launch_of(module: ModuleType, name: str, call: Callable[[], object]) -> Launch:
    """The launch of the module's kernel that `call` makes; what would come after it is not computed."""
    found: list[Launch] = []
    kernel = getattr(module, name)

    def stop(grid: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(Launch(kernel, grid, args, kwargs))
        raise _Recorded

    with _in_place_of(module, name, stop), suppress(_Recorded):
        call()
    return found[0]


@contextmanager
def replayed(module: ModuleType, name: str, launch: Launch) -> Iterator[None]:
    """The launch of the module's kernel gives what `launch` gave, which has run."""
    with _in_place_of(module, name, lambda grid, args, kwargs: launch.collect(args)):
        yield


def run(launches: list[Launch], seconds: float = 30.0) -> bool:
    """Run all, of the same grid, one after the other in each program's process. False where they wait for ever."""
    _rewrite(launches[0].kernel)
    (columns, rows) = launches[0].grid
    children = [_child(launches, (x, y)) for x in range(columns) for y in range(rows)]
    deadline = time.monotonic() + seconds
    failed, late = False, False
    while children and not failed and not late:
        late = time.monotonic() > deadline
        for pid in tuple(children):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                children.remove(pid)
                failed = failed or status != 0
        time.sleep(0.005)
    for pid in children:
        os.kill(pid, signal.SIGABRT if late else signal.SIGKILL)  # who is late prints where it stands
        os.waitpid(pid, 0)
    assert not failed, "a program raised; its process has printed what"
    for launch in launches:
        launch.collect()
    return not late


def _rewrite(kernel: Any, seen: set[str] | None = None) -> None:
    """The interpreter rewrites each function at its first call: here for all processes at once."""
    seen = set() if seen is None else seen
    kernel.rewrite()
    for name in kernel.fn.__code__.co_names:
        called = kernel.fn.__globals__.get(name)
        if isinstance(called, type(kernel)) and name not in seen:
            seen.add(name)
            _rewrite(called, seen)


def _child(launches: list[Launch], index: tuple[int, int]) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    gc.disable()  # garbage of the parent may wait for a thread that the child does not have
    faulthandler.enable()
    try:
        _run_program(launches, index)
        status = 0
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(status)


def _run_program(launches: list[Launch], index: tuple[int, int]) -> None:
    """The interpreter is told of a grid of one program, and the program of the whole grid and of its own place."""
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    atomic, grid_dim, grid_idx = builder.create_atomic_rmw, builder.set_grid_dim, builder.set_grid_idx

    parent = os.getppid()

    def yielding(*args: Any) -> Any:
        if os.getppid() != parent:  # which was killed: nobody waits for what would wait for ever
            os._exit(1)
        time.sleep(1e-3)  # there may be more programs than processors, and who waits shall not hold one
        return atomic(*args)

    with (
        numpy.errstate(all="ignore"),  # as a GPU does: who reads too early may read anything
        mock.patch.object(builder, "create_atomic_rmw", yielding),
        mock.patch.object(builder, "set_grid_dim", lambda self, *_: grid_dim(self, *launches[0].grid, 1)),
        mock.patch.object(builder, "set_grid_idx", lambda self, *_: grid_idx(self, *index, 0)),
        # Which would write back, at another time, what is in its place already.
        mock.patch.object(interpreter.GridExecutor, "_restore_args_dev"),
    ):
        for launch in launches:
            launch.kernel[1, 1](*launch.args, **launch.kwargs)
