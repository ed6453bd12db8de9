"""One recurrent layer in one direction of a padded batch, by the backend that runs or by one that is named."""

from __future__ import annotations

from torch import Tensor

from normwise.backends.protocol import LayerRequest, LayerResult, RecurrenceRequest, Running
from normwise.backends.recurrence import Recurrence, Weights
from normwise.ops.dispatch import resolve
from normwise.ops.rnn import packed, stack


def recurrence(
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: Weights,
    config: Recurrence,
    *,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    reverse: bool = False,
    zoneout_mask: Tensor | None = None,
    running: Running | None = None,
    start_step: int = 0,
) -> LayerResult:
    """As `reference.recurrence.recurrence`: what goes in and comes out is padded, (T, B, ...)."""
    given = packed.padded(x, lengths, batch_first=False, bidirectional=reverse)
    layout, order = given.layout, given.order
    resets = (None, None) if reset is None else packed.resets(given, reset, bidirectional=True)
    h0, c0 = (None if s is None else s[None] if order is None else packed.sort(s[None], order) for s in (h0, c0))
    tables = None if running is None else (running,)
    whole = RecurrenceRequest(config, given.x, h0, c0, (weights,), layout, resets, tables, start_step)
    kernel = resolve(whole, "recurrence").backend.recurrence.kernels["layer"]
    if zoneout_mask is not None:
        source = given.source
        zoneout_mask = zoneout_mask[: layout.steps] if source is None else zoneout_mask.flatten(0, 1)[source]
    c = None if c0 is None else c0[0]
    flags = resets[reverse]
    request = LayerRequest(
        config, given.x, h0[0], c, weights, layout, reverse, flags, zoneout_mask, running, start_step
    )
    found = stack.layer(kernel, request)
    output = packed.output(found.output, given, x.shape, batch_first=False)
    h, c = (s if s is None or order is None else packed.restore(s[None], order)[0] for s in (found.h, found.c))
    return LayerResult(output, h, c, found.statistics)
