"""Calls a function of a test file in a child process: what ends the child by a signal ends no test run, and is said.

Children are forked from the server of `on_ranks`, which has imported torch and run no parallel region. One child makes
all the calls, since each of them takes a millisecond; where it dies, another one goes on with the next call.
"""

from __future__ import annotations

import importlib.util
import pickle
import signal
import sys
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from support.on_ranks import SERVER


def in_children(function: Callable[[Any], Any], arguments: Sequence[Any], timeout: float = 60.0) -> list[Any]:
    """`function(argument)` for each argument, in their order. A call that raises, ends its process or does not return
    within `timeout` seconds has a `Fault` for its result."""
    file = sys.modules[function.__module__].__file__
    assert file is not None
    answers: list[Any] = []
    while len(answers) < len(arguments):
        reader, writer = SERVER.Pipe(duplex=False)
        left = list(arguments[len(answers) :])
        child = SERVER.Process(target=_answer, args=(writer, file, function.__name__, left), daemon=True)
        child.start()
        writer.close()  # the child holds the only other end, so that its death can be read
        try:
            for _ in left:
                if not wait([reader], timeout):
                    answers.append(Fault("TimeoutError", f"no answer within {timeout} s"))
                    break
                answers.append(pickle.loads(reader.recv_bytes()))
        except EOFError:
            child.join()
            answers.append(Fault("signal", signal.Signals(-(child.exitcode or 0)).name))
        finally:
            child.kill()
            child.join()
    return answers


class Fault:
    """What a call ended with: the name of its exception's class, or "signal", and what was said."""

    def __init__(self, kind: str, said: str) -> None:
        self.kind, self.said = kind, said

    def __repr__(self) -> str:
        return f"{self.kind}: {self.said}"


def _answer(writer: Connection, file: str, name: str, arguments: list[Any]) -> None:
    torch.set_num_threads(1)
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    for argument in arguments:
        torch.manual_seed(0)
        try:
            answer = getattr(module, name)(argument)
        except Exception as error:
            answer = Fault(type(error).__name__, str(error))
        writer.send_bytes(pickle.dumps(answer))
