"""Compiled code turned off for a while."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def run_eagerly() -> Iterator[None]:
    """Compiled parts of a model run as they are written, so that hooks see them."""
    if "torch._dynamo" not in sys.modules:  # nothing was compiled, and loading the compiler takes a second
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
