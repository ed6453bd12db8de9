"""The reference as a backend: it runs everything."""

from __future__ import annotations

from normwise.backends.protocol import Backend, Operation, no_shortcoming, supports_all
from normwise.backends.reference import norms, rnn

BACKEND = Backend(
    "reference",
    lambda: None,
    Operation(supports_all, no_shortcoming, norms.FAMILIES),
    Operation(supports_all, no_shortcoming, rnn.KERNELS),
)
