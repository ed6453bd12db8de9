"""From the name of a backend, which a node of a program states, to the backend."""

from __future__ import annotations

from normwise.backends.protocol import Backend
from normwise.ops.dispatch import BACKENDS, BackendError


def required(name: str) -> Backend:
    """Raises BackendError where it cannot be used: a program may have been exported on another machine."""
    backend = BACKENDS[name]
    reason = backend.missing()
    if reason is not None:
        raise BackendError(
            f"this program was compiled or exported for normwise's backend {name!r}, which cannot be used here: "
            f"{reason}. Compile or export it again on this machine"
        )
    return backend
