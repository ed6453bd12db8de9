"""Recurrences of the backend protocol by the reference's loop, which knows padded sequences: packed rows are unpacked,
and packed again."""

from __future__ import annotations

import torch
from torch import Tensor

from normwise.backends.protocol import LayerKernel, LayerRequest, LayerResult, Layout
from normwise.backends.reference.recurrence import recurrence
from normwise.backends.reference.sequences import reverse as reversed_steps


def layer(request: LayerRequest, needs_grad: bool = False) -> LayerResult:
    """One layer in one direction, in any layout."""
    config, x, h0, c0, weights, layout, reverse, reset, zoneout_mask, running, start_step = request
    rows, place, lengths = (x, reset, zoneout_mask), None, layout.lengths
    if layout.batch_sizes is not None:
        place, lengths = _places(layout, x.device)
        rows = tuple(_pad(t, place, layout) for t in rows)  # type: ignore[assignment]
    if reverse:
        # Flags lie where the state is zeroed, so that turned round with x they are those of the forward direction.
        rows = tuple(None if t is None else reversed_steps(t, lengths) for t in rows)  # type: ignore[assignment]
    result = recurrence(
        rows[0],
        h0,
        c0,
        weights,
        config,
        lengths=lengths,
        reset=rows[1],
        zoneout_mask=rows[2],
        running=running,
        start_step=start_step,
    )
    output = reversed_steps(result.output, lengths) if reverse else result.output
    if place is not None:
        output = output.flatten(0, 1).index_select(0, place)
    return LayerResult(output, result.h, result.c, result.statistics)


def _places(layout: Layout, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where each packed row is in (steps, batch), and how long each sequence is."""
    assert layout.batch_sizes is not None
    valid = torch.arange(layout.batch, device="cpu") < layout.batch_sizes[:, None]
    places, lengths = valid.flatten().nonzero().flatten(), valid.sum(0)
    return places.to(device, non_blocking=True), lengths.to(device, non_blocking=True)


def _pad(rows: Tensor | None, place: Tensor, layout: Layout) -> Tensor | None:
    if rows is None:
        return None
    steps = max(layout.steps, 1)  # the loop wants one, if only of padding
    padded = rows.new_zeros(steps * layout.batch, *rows.shape[1:])
    return padded.index_copy(0, place, rows).view(steps, layout.batch, *rows.shape[1:])


KERNELS = {"layer": LayerKernel(layer)}
