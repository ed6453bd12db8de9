"""What torch.autocast means for a stack of recurrent layers."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from normwise.backends.protocol import RecurrenceRequest
from normwise.ops._torch_internals import constant_while_compiling


def dtype_of(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast asks for; None outside of it, and for float64."""
    kind = x.device.type
    if not _has_autocast(kind) or not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(kind)


def cast(request: RecurrenceRequest) -> RecurrenceRequest:
    """Under autocast all in its dtype, as torch's own layers do; norms and states stay in float32 inside the loop."""
    dtype = request.autocast
    if dtype is None:
        return request
    weights = tuple(
        w._replace(
            weight_ih=w.weight_ih.to(dtype),
            weight_hh=w.weight_hh.to(dtype),
            weight_hr=None if w.weight_hr is None else w.weight_hr.to(dtype),
        )
        for w in request.weights
    )
    c0 = None if request.c0 is None else request.c0.to(dtype)
    return request._replace(x=request.x.to(dtype), h0=request.h0.to(dtype), c0=c0, weights=weights)


def off(request: RecurrenceRequest) -> AbstractContextManager[Any]:
    """Where autocast is on, off: what is inside is of the dtypes that it is to be of."""
    return nullcontext() if request.autocast is None else torch.autocast(request.x.device.type, enabled=False)


@constant_while_compiling
def _has_autocast(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind)
