"""Running compiled models eagerly."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from normwise.ops._torch_internals import compiler_loaded


@contextmanager
def run_eagerly() -> Iterator[None]:
    """Compiled parts of a model run eagerly inside, so that hooks see them."""
    if not compiler_loaded():
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
