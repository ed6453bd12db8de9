"""Naming the backend that a test runs on, and seeing that it was that one which ran."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest
import torch

import normwise
from normwise import reference
from normwise.kernels import channels, cpu, groups, rows
from normwise.kernels import recurrent as recurrent_kernels
from normwise.ops import plain, recurrent, recurrent_loop
from normwise.reference import recurrent as recurrent_reference

# "chosen": whatever is best here; "compiled": the compiled kernels, for small inputs too, which otherwise take ATen's
# call; "uncompiled": what is chosen without them.
BACKENDS = ["chosen", "compiled", "uncompiled", "torch", "reference"]
# Which of the real backends may run, and one of which must, under each name; "chosen" is none.
_MAY_RUN = {
    "compiled": {"cpu"},
    "cpu": {"cpu"},
    "uncompiled": {"torch", "reference"},
    "torch": {"torch"},
    "reference": {"reference"},
}

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def each_backend_and_dtype(*dtypes: torch.dtype) -> pytest.MarkDecorator:
    """Parameters "backend" and "dtype", of DTYPES unless named; the kernels know no float16."""
    return pytest.mark.parametrize(
        ("backend", "dtype"),
        [
            pytest.param(backend, dtype, id=f"{backend}-{dtype}")
            for backend in BACKENDS
            for dtype in dtypes or DTYPES
            if not (backend == "compiled" and dtype == torch.float16)
        ],
    )


# The functions by which a backend computes, as normwise calls them.
_ATEN = ["native_batch_norm", "native_group_norm", "native_layer_norm"]
_ATEN += ["batch_norm", "group_norm", "instance_norm", "layer_norm", "rms_norm"]
_ENTRIES: list[tuple[str, Any, str]] = [
    *(("cpu", module, name) for module in (rows, groups, channels) for name in ("_forward", "_backward")),
    ("cpu", recurrent_kernels, "_call"),
    *(("torch", torch, name) for name in _ATEN),
    ("torch", recurrent_loop, "recurrence"),
    ("reference", reference, "norm"),
    ("reference", recurrent_reference, "recurrence"),
]


@contextmanager
def ran() -> Iterator[set[str]]:
    """The backends that normwise computes by inside the block: "cpu", "torch", "reference".

    Of a backward the C++ kernels alone count: their second derivative is the reference's. What a test calls
    itself, such as the layer of torch.nn that it compares with, does not count either.
    """
    found: set[str] = set()

    def noted(backend: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            by_normwise = sys._getframe(1).f_globals["__name__"].startswith("normwise.")
            if by_normwise and (backend == "cpu" or torch._C._current_graph_task_id() == -1):
                found.add(backend)
            return function(*args, **kwargs)

        return call

    with ExitStack() as stack:
        for backend, owner, name in _ENTRIES:
            stack.enter_context(mock.patch.object(owner, name, noted(backend, getattr(owner, name))))
        layers = {key: noted("torch", function) for key, function in recurrent._ATEN.items()}
        stack.enter_context(mock.patch.dict(recurrent._ATEN, layers))
        yield found


@contextmanager
def using(backend: str) -> Iterator[None]:
    """Layers run by `backend`, one of BACKENDS or "cpu", which forces the kernels; fails if another one computed.

    Skips a test that asks for the compiled kernels where there are none.
    """
    if backend == "chosen":
        yield
        return
    if backend in ("compiled", "cpu") and not cpu.available():
        pytest.skip(f"no compiled kernels: {cpu.why_not()}")
    with _switched_to(backend), ran() as found:
        yield
    assert found, f"asked for {backend!r}, but no backend ran"
    assert found <= _MAY_RUN[backend], f"asked for {backend!r}, but {', '.join(sorted(found))} ran"


@contextmanager
def _switched_to(backend: str) -> Iterator[None]:
    if backend == "compiled":
        with mock.patch.object(plain, "SMALL", -1):
            yield
    elif backend == "uncompiled":
        with without_kernels():
            yield
    else:
        with normwise.backend(backend):
            yield


@contextmanager
def without_kernels() -> Iterator[None]:
    """As on a machine without the library."""
    if not cpu.available():
        yield
        return
    before = cpu.isa()
    cpu.use_isa("none")
    try:
        yield
    finally:
        cpu.use_isa(before)
