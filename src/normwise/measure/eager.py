"""Compiled code turned off for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from normwise.ops._torch_internals import compiler_loaded


@contextmanager
def run_eagerly() -> Iterator[None]:
    """Compiled parts of a model run as they are written, so that hooks see them."""
    if not compiler_loaded():
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
