"""What the code of a forward reads of global names: flags and numbers that somebody may change."""

from __future__ import annotations

import dis
import enum
import gc
import inspect
import logging
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import BuiltinFunctionType, CodeType, FrameType, FunctionType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn

from normwise.surgery.report import Refusal

MUTABLE = (list, dict, set, deque)
# Of these, what a graph says does not go by what is in them.
_HARMLESS = (torch.Tensor, torch.dtype, torch.device, nn.Module, logging.Logger, logging.LoggerAdapter)
_ATTRIBUTES = ("LOAD_ATTR", "LOAD_METHOD")


class Global(NamedTuple):
    """A name in a Python module, and its value."""

    module: str
    name: str
    value: Any


@contextmanager
def code_noted(ran: dict[CodeType, dict[str, Any]], is_users: Callable[[FrameType], bool]) -> Iterator[None]:
    """Notes the code of the user's functions that are called while it is open, with their global names.

    No garbage is collected meanwhile: what others have asked to be told of it would be called from within a forward.
    """

    def called(frame: FrameType, event: str, argument: Any) -> None:
        home = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if event == "call" and is_users(frame) and home not in sys.stdlib_module_names:
            ran[frame.f_code] = frame.f_globals

    before, collects = sys.getprofile(), gc.isenabled()
    gc.disable()
    sys.setprofile(called)
    try:
        yield
    finally:
        sys.setprofile(before)
        if collects:
            gc.enable()


def globals_read(ran: Mapping[CodeType, Mapping[str, Any]]) -> list[Global]:
    """The flags, numbers and names that these functions read of Python modules.

    Raises:
        Refusal: one reads something else, whose content nobody can tell when it changes.
    """
    found: dict[tuple[str, str], Global] = {}
    for code, scope in ran.items():
        home = sys.modules.get(str(scope.get("__name__")))
        if home is None or vars(home) is not scope:
            continue
        for one in _reads(code, home):
            found.setdefault(one[:2], one)
    return list(found.values())


def _reads(code: CodeType, home: ModuleType) -> Iterator[Global]:
    steps = list(dis.get_instructions(code))
    for n, step in enumerate(steps):
        if step.opname != "LOAD_GLOBAL" or step.argval not in vars(home):
            continue
        owner, name = home, str(step.argval)
        value = vars(home)[name]
        for more in steps[n + 1 :]:
            if not isinstance(value, ModuleType) or more.opname not in _ATTRIBUTES:
                break
            owner, name = value, str(more.argval)
            value = getattr(owner, name, None)
        is_marker = type(value) is object or name.startswith("__")
        if is_marker or callable(value) or isinstance(value, (ModuleType, *_HARMLESS)):
            continue
        if not can_be_compared(value):
            what = f"{name}, a {type(value).__name__} of {owner.__name__}"
            raise Refusal(f"its forward goes by {what}, of which nobody can tell when it changes")
        if sys.modules.get(owner.__name__) is owner:
            yield Global(owner.__name__, name, value.copy() if type(value) in MUTABLE else value)


def can_be_compared(value: Any) -> bool:
    """Whether it can be told of a value that it is the same as before."""
    if isinstance(value, (tuple, list, set, frozenset, deque)):
        return all(map(can_be_compared, value))
    if isinstance(value, dict):
        return all(map(can_be_compared, value.values()))
    return value is None or isinstance(
        value,
        (
            enum.Enum,
            bool,
            int,
            float,
            str,
            torch.dtype,
            torch.device,
            FunctionType,
            BuiltinFunctionType,
            type,
            inspect.Parameter,
        ),
    )
