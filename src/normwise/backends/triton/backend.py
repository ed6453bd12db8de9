"""Our Triton kernels as a backend."""

from __future__ import annotations

from typing import Any

from normwise.backends.protocol import Backend, Operation, no_shortcoming
from normwise.backends.triton import norms, runtime


def no_recurrence(request: Any) -> str | None:
    return "there is no Triton kernel of a recurrent layer"


BACKEND = Backend(
    "triton",
    runtime.missing,
    Operation(norms.supports, no_shortcoming, norms.FAMILIES),
    Operation(no_recurrence, no_shortcoming, {}),
)
