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
    takes_onednn = torch.backends.mkldnn.is_available()
    return dtype == torch.float16 or (dtype == torch.bfloat16 and takes_onednn and not onednn_knows_bfloat16())


@constant_while_compiling
def onednn_knows_bfloat16() -> bool:
    """Whether torch has its kernels run bfloat16 on this CPU, as its LSTM; False without oneDNN."""
    return _onednn_knows_bfloat16()


@functools.cache
def _onednn_knows_bfloat16() -> bool:
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
