"""Calls of Triton's recurrent kernels: on the GPU, or by Triton's interpreter on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from normwise.backends.protocol import LayerRequest, LayerResult, Layout
from normwise.backends.recurrence import Recurrence, Weights
from normwise.backends.triton import rnn, runtime
from normwise.ops.rnn.presets import PRESETS, preset
from support.recurrent_samples import CONFIGS, Sample

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RUNS = DEVICE == "cuda" or runtime.interpreted()
RECURRENCES = CONFIGS | {
    f"{cell} {name} rms": preset(cell, "rms", name)
    for cell, presets in PRESETS.items()
    for name, config in presets.items()
    if config.norm != "batch"
}
RECURRENCES["lstm input"] = Recurrence("lstm", norm_placement="input")
RECURRENCES["gru input"] = Recurrence("gru", norm_placement="input")
RECURRENCES["rnn input relu"] = Recurrence("rnn", norm_placement="input", nonlinearity="relu")
RECURRENCES["lstm no cell bias"] = Recurrence("lstm", cell_norm="state", cell_bias=False)

ALL = [True] * (3 + len(Weights._fields))


@contextmanager
def language_prepared_once() -> Iterator[None]:
    """Triton's interpreter replaces the functions of Triton's language at a launch, and again at each call of a
    function by a kernel: that is most of its time. Inside, it is done once."""
    if not runtime.interpreted():
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    from normwise.backends.triton.kernels import recurrent

    def nothing(function: Any) -> Any:
        return interpreter._LangPatchScope()

    scopes = [interpreter._patch_lang(function.fn) for function in (recurrent.step_forward, tl.sum)]
    try:
        with mock.patch.object(interpreter, "_patch_lang", nothing):
            yield
    finally:
        for scope in reversed(scopes):
            scope.restore()


def moved(request: LayerRequest) -> LayerRequest:
    """The request on the device that kernels run on."""
    layout = request.layout
    return request._replace(
        x=_moved(request.x),
        h0=_moved(request.h0),
        c0=_moved(request.c0),
        weights=Weights(*map(_moved, request.weights)),
        reset=_moved(request.reset),
        layout=Layout(layout.steps, layout.batch, layout.batch_sizes, _moved(layout.flip)),
    )


def _moved(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.to(DEVICE)


def by_triton(sample: Sample) -> list[Tensor]:
    """What `Sample.truth` lists, by the kernels."""
    request = moved(sample.given)
    found: LayerResult = rnn.forward(request, True)
    again = rnn.forward(request, False)
    for kept, not_kept in zip(found[:3], again[:3], strict=True):  # keeping values changes none
        assert (kept is None and not_kept is None) or torch.equal(kept, not_kept)
    upstream = [*map(_moved, sample.upstream_of_rows), None][:3]
    gradients = rnn.backward(request, found.saved, upstream, ALL)
    outputs = [t.cpu() for t in found[:3] if t is not None]
    return sample.as_given(outputs, [None if t is None else t.cpu() for t in gradients])
