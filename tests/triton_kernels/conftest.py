"""The GPU kernels, run by Triton's interpreter on tensors of the CPU: `make test-triton`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    # The products between two kernels are torch's. MKL sums one differently where its tensors lie differently in
    # memory, on some processors (AMD's with AVX2 among them), which a GPU's tests of equal bits must not see. MKL reads
    # this at its first call.
    os.environ.setdefault("MKL_CBWR", "COMPATIBLE")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Triton reads the variable when it is imported: to set it here would change what other tests run."""
    if find_spec("triton") is not None and os.environ.get("TRITON_INTERPRET") == "1":
        return
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="needs Triton and TRITON_INTERPRET=1: make test-triton"))


@pytest.fixture(scope="package", autouse=True)
def quick_interpreter() -> Iterator[None]:
    """For every test here."""
    from support.triton_recurrences import language_prepared_once

    with language_prepared_once():
        yield


@pytest.fixture(autouse=True)
def rounding_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter cuts bits off where a GPU rounds float32 to the nearest bfloat16, ties to even; told to
    round so, it forgets the carry into the exponent."""
    import triton.language as tl
    from triton.runtime import interpreter

    cast = interpreter.InterpreterBuilder.cast_impl

    def rounded(self: Any, source: Any, to: Any) -> Any:
        if source.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16:
            bits = torch.from_numpy(np.array(source.data)).bfloat16().view(torch.int16).numpy().view(np.uint16)
            return interpreter.TensorHandle(bits, tl.bfloat16)
        return cast(self, source, to)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "cast_impl", rounded)


@pytest.fixture(autouse=True)
def fresh_memory_of_nan(poisoned_memory: None) -> None:
    """For every test here."""
