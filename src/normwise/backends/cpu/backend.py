"""Our C++ library as a backend."""

from __future__ import annotations

from normwise.backends.cpu import library, norms, rnn
from normwise.backends.protocol import Backend, Operation, no_shortcoming

BACKEND = Backend(
    "cpu",
    library.missing,
    Operation(norms.supports, no_shortcoming, norms.FAMILIES),
    Operation(rnn.supports, no_shortcoming, rnn.KERNELS),
)
