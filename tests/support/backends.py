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
from normwise.ops.dispatch import BACKENDS as PROVIDERS

# "triton" is for where its interpreter runs, see tests/triton_kernels/.
# "chosen": whatever is best here; "kernels": the C++ kernels; "no kernels": what is chosen without them.
BACKENDS = ["chosen", "kernels", "no kernels", "aten", "reference"]
# Which of the real backends may run, and one of which must, under each name; "chosen" is none.
_MAY_RUN = {
    "kernels": {"cpu"},
    "cpu": {"cpu"},
    "no kernels": {"aten", "reference"},
    "aten": {"aten"},
    "triton": {"triton"},
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


@contextmanager
def ran() -> Iterator[set[str]]:
    """The backends that normwise computes by inside the block: "cpu", "triton", "aten", "reference".

    Of a backward the kernels alone count: their second derivative is the reference's.
    """
    found: set[str] = set()

    def noted(backend: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if backend in ("cpu", "triton") or torch._C._current_graph_task_id() == -1:
                found.add(backend)
            return function(*args, **kwargs)

        return call

    with ExitStack() as stack:
        for backend, provider in PROVIDERS.items():
            for kernels in (provider.norm.kernels, provider.recurrence.kernels):
                patched = {}
                for name, kernel in kernels.items():
                    fields = {
                        field: noted(backend, function)
                        for field, function in kernel._asdict().items()
                        if field in ("forward", "backward") and function is not None
                    }
                    patched[name] = kernel._replace(**fields)
                stack.enter_context(mock.patch.dict(kernels, patched))
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
    if backend == "no kernels":
        with without_kernels():
            yield
    else:
        with normwise.backend("cpu" if backend == "kernels" else backend):
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
