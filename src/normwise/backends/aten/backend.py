"""ATen as a backend."""

from __future__ import annotations

from normwise.backends.aten import norms
from normwise.backends.protocol import Backend, Operation

BACKEND = Backend("aten", lambda: None, Operation(norms.supports, norms.shortcoming, norms.FAMILIES))
