"""ATen as a backend."""

from __future__ import annotations

from normwise.backends.aten import norms, rnn
from normwise.backends.protocol import Backend, Operation, no_shortcoming

BACKEND = Backend(
    "aten",
    lambda: None,
    Operation(norms.supports, norms.shortcoming, norms.FAMILIES),
    Operation(rnn.supports, no_shortcoming, rnn.KERNELS),
)
