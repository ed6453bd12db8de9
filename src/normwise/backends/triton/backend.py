"""Our Triton kernels as a backend."""

from __future__ import annotations

from normwise.backends.protocol import Backend, Operation, no_shortcoming
from normwise.backends.triton import norms, rnn, running_stats, runtime

BACKEND = Backend(
    "triton",
    runtime.missing,
    Operation(norms.supports, no_shortcoming, norms.FAMILIES),
    Operation(rnn.supports, no_shortcoming, rnn.KERNELS),
    Operation(running_stats.supports, no_shortcoming, {"update": running_stats.update}),
)
