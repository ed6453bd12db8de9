"""Our Triton kernels as a backend."""

from __future__ import annotations

from typing import Any

from normwise.backends.protocol import Backend, LayerKernel, Operation, no_shortcoming
from normwise.backends.triton import lengths, norms, running_stats, runtime


# Recurrences are imported when the first one comes that may run here: to most imports of the package they are nothing.
def _rnn_supports(request: Any) -> str | None:
    from normwise.backends.triton import rnn

    return rnn.supports(request)


def _rnn_forward(*arguments: Any) -> Any:
    from normwise.backends.triton import rnn

    return rnn.forward(*arguments)


def _rnn_backward(*arguments: Any) -> Any:
    from normwise.backends.triton import rnn

    return rnn.backward(*arguments)


def _rnn_saves(*arguments: Any) -> Any:
    from normwise.backends.triton import rnn

    return rnn.saves(*arguments)


BACKEND = Backend(
    "triton",
    runtime.missing,
    Operation(norms.supports, no_shortcoming, norms.FAMILIES),
    Operation(_rnn_supports, no_shortcoming, {"layer": LayerKernel(_rnn_forward, _rnn_backward, _rnn_saves)}),
    Operation(
        running_stats.supports,
        no_shortcoming,
        {"update": running_stats.update, "update_over_samples": running_stats.update_over_samples},
    ),
    Operation(lengths.supports, no_shortcoming, {"mask": lengths.mask}),
)
