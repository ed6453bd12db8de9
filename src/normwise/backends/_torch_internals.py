"""The private names of torch that backends use; those of ops are in `ops/_torch_internals.py`, with tests for both."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])

# What torch.batch_norm calls, on a GPU cuDNN's kernel where it does: it keeps the mean and 1 / sqrt(var + eps) too.
batch_norm_with_stats = torch._batch_norm_impl_index


def constant_while_compiling(function: F) -> F:
    """`function`, whose result torch.compile takes for a constant instead of tracing it.

    What torch.compiler.assume_constant_result does; but calling that loads the compiler, which costs a second.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_while_compiling
def lstm_fails_under_autocast(dtype: torch.dtype) -> bool:
    """Whether torch.lstm does on this CPU: there it takes oneDNN's kernel without asking whether that knows the dtype.

    Bfloat16 needs a processor with AVX-512 or the like. Without autocast torch asks, and runs step by step.
    """
    return dtype == torch.float16 or (dtype == torch.bfloat16 and not _onednn_knows_bfloat16())


@functools.cache
def _onednn_knows_bfloat16() -> bool:
    """True without oneDNN too: torch does not take it then."""
    return not torch.backends.mkldnn.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported()
