"""Naming the backend that a test runs on, and seeing that it was that one which ran."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest
import torch

import normwise
from normwise.backends.cpu import library
from normwise.backends.cpu import recurrent as recurrent_kernels
from normwise.backends.protocol import NormFamily
from normwise.backends.reference import recurrent as recurrent_reference
from normwise.ops.dispatch import BACKENDS as KNOWN
from normwise.ops.rnn import loop as recurrent_loop
from normwise.ops.rnn import stack as recurrent

# "chosen": whatever is best here; "kernels": that, which must be the C++ kernels; "no kernels": what is chosen without
# them; the others force a backend.
BACKENDS = ["chosen", "kernels", "no kernels", "aten", "reference"]
# Which of the real backends may run, and one of which must, under each name; "chosen" is none.
_MAY_RUN = {
    "kernels": {"cpu"},
    "cpu": {"cpu"},
    "no kernels": {"aten", "reference"},
    "aten": {"aten"},
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
            if not (backend == "kernels" and dtype == torch.float16)
        ],
    )


# The functions by which a backend computes recurrences, as normwise calls them.
_RECURRENCES: list[tuple[str, Any, str]] = [
    ("cpu", recurrent_kernels, "_call"),
    ("aten", recurrent_loop, "recurrence"),
    ("reference", recurrent_reference, "recurrence"),
]


@contextmanager
def ran() -> Iterator[set[str]]:
    """The backends that normwise computes by inside the block: "cpu", "aten", "reference".

    Of a backward the C++ kernels alone count: their second derivative is the reference's.
    """
    found: set[str] = set()

    def noted(backend: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if backend == "cpu" or torch._C._current_graph_task_id() == -1:
                found.add(backend)
            return function(*args, **kwargs)

        return call

    def noted_family(backend: str, family: NormFamily) -> NormFamily:
        return NormFamily(*(None if way is None else noted(backend, way) for way in family))  # type: ignore[arg-type]

    with ExitStack() as stack:
        for name, backend in KNOWN.items():
            kernels = {family: noted_family(name, ways) for family, ways in backend.norm.kernels.items()}
            stack.enter_context(mock.patch.dict(backend.norm.kernels, kernels))
        for name, owner, function in _RECURRENCES:
            stack.enter_context(mock.patch.object(owner, function, noted(name, getattr(owner, function))))
        layers = {key: noted("aten", function) for key, function in recurrent._ATEN.items()}
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
    if backend in ("kernels", "cpu") and library.missing() is not None:
        pytest.skip(f"no compiled kernels: {library.missing()}")
    with _switched_to(backend), ran() as found:
        yield
    assert found, f"asked for {backend!r}, but no backend ran"
    assert found <= _MAY_RUN[backend], f"asked for {backend!r}, but {', '.join(sorted(found))} ran"


@contextmanager
def _switched_to(backend: str) -> Iterator[None]:
    if backend == "kernels":
        yield
    elif backend == "no kernels":
        with without_kernels():
            yield
    else:
        with normwise.backend(backend):
            yield


@contextmanager
def without_kernels() -> Iterator[None]:
    """As on a machine without the library."""
    if library.missing() is not None:
        yield
        return
    before = library.isa()
    library.use_isa("none")
    try:
        yield
    finally:
        library.use_isa(before)
