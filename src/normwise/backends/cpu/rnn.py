"""Recurrences by the C++ kernels: from the tensors of a request to the structs of csrc/include/normwise.h, and back.

One layer in one direction, all steps in one call. All is float32, or x, the state and the two matrices are bfloat16 and
gains and biases bfloat16 or float32. With bfloat16 matrices are multiplied in it, and everything else is computed, and
kept for the backward, in float32; results and gradients come in the dtype of what they belong to.
"""

import ctypes
from collections.abc import Sequence
from functools import cache
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from normwise.backends.cpu import library, structs
from normwise.backends.cpu.library import functions, raise_fault
from normwise.backends.cpu.memory import DTYPES, address
from normwise.backends.protocol import (
    LayerKernel,
    LayerRequest,
    LayerResult,
    Layout,
    Moments,
    RecurrenceRequest,
    Running,
    Saved,
)
from normwise.backends.recurrence import Recurrence, Weights

# The argument structs of normwise.h: pointers, int64, double, int32.
FORWARD, BACKWARD = STRUCTS = tuple(map(structs.packer, (structs.RECURRENT_FORWARD, structs.RECURRENT_BACKWARD)))
_RECURRENT = structs.packer(structs.RECURRENT)

# The enums of normwise.h.
_CELLS = {"lstm": 0, "gru": 1, "rnn_tanh": 2, "rnn_relu": 3}
_PLACEMENTS = {None: 0, "separate": 1, "sum": 2, "input": 3}
_OF_ROW, _OF_STEP, _GIVEN = 0, 1, 2
_CELL_NORMS: dict[str | None, int] = {None: 0, "readout": 1, "state": 2}

# What a forward keeps for the backward, None where this recurrence does not need it. The output is row by row in the
# order of processing; in float32 where what the caller gets is rounded, and that would not do.
SAVED = ("output", "input_terms", "hidden_terms", "cells", "stats")
# After these a batch norm keeps the statistics of the steps, (2, steps, features): means and biased variances.
# The struct's order of parameters. A norm over the sum has its gain where the kernel keeps the hidden term's.
_ORDER = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "gain_ih", "gain_hh", "bias_inner", "gain_c", "bias_c")

_WIDE = torch.float32


def supports(request: RecurrenceRequest) -> str | None:
    """What the kernels cannot do; that there are no kernels here is the last reason to be named."""
    config, dtype = request.config, request.autocast or request.x.dtype
    if config.norm == "batch" and config.statistics == "sequence" and request.running is None:
        return "the C++ kernels take the batch statistics of single steps, not of whole sequences"
    if request.running is not None and (obstacle := _obstacle_of_tables(request.running)) is not None:
        return obstacle
    if config.norm not in (None, "batch") and config.norm_placement == "input":
        return "the C++ kernels take no layer or RMS norm on the input term alone"
    if config.zoneout:
        return "the C++ kernels take no zoneout"
    for weights in request.weights:
        if weights.weight_hr is not None:
            return "the C++ kernels take no projection"
        if 0 in (weights.weight_ih.shape[-1], weights.weight_hh.shape[-1]):
            return "the C++ kernels have at least one input and one unit"
        if config.norm == "batch" and {dtype, *(w.dtype for w in weights if w is not None)} != {_WIDE}:
            return "the C++ kernels take statistics of a batch in float32 alone"
        if not _known_dtypes(dtype, weights, request.autocast is not None):
            dtypes = sorted({str(dtype), *(str(w.dtype) for w in weights if w is not None)})
            return f"the recurrent C++ kernels take float32 or bfloat16, not {', '.join(dtypes)}"
    return library.missing()


def _obstacle_of_tables(running: Sequence[Running]) -> str | None:
    """What keeps the kernels from running statistics, or None."""
    tables = [table for of_layer in running for pair in of_layer.values() for table in pair]
    if any(table.dtype is not _WIDE for table in tables):
        return "the C++ kernels take running statistics in float32 alone"
    if torch.is_grad_enabled() and any(table.requires_grad for table in tables):
        return "the C++ kernels give no gradient of running statistics"
    return None


def _known_dtypes(dtype: torch.dtype, weights: Weights, autocast: bool) -> bool:
    """All float32; or bfloat16, where gains and biases may be float32, as under autocast."""
    if dtype is not torch.float32 and dtype is not torch.bfloat16:
        return False
    if autocast:
        return all(w is None or w.dtype in (dtype, torch.float32) for w in weights[2:])
    if not weights.weight_ih.dtype == weights.weight_hh.dtype == dtype:
        return False
    return all(w is None or w.dtype == dtype or w.dtype == torch.float32 for w in weights)


def forward(request: LayerRequest, needs_grad: bool) -> LayerResult:
    """All steps; keeps what `backward` needs if `needs_grad`."""
    config, given, layout = request.config, request.x, request.layout
    at = _readable(request)
    x, h0, c0, units = at.x, at.h0, at.c0, at.units
    output = torch.empty((*x.shape[:-1], units), dtype=_WIDE, device="cpu")  # whatever the defaults are
    saved: list[Tensor | None] = [None] * 4
    if needs_grad:
        widths = saved_widths(config, x.shape[-1], units, given.dtype)
        saved = [output.new_empty((at.rows, width)) if width else None for width in widths[:4]]
    h = torch.empty_like(h0)
    c = None if c0 is None else torch.empty_like(c0)
    stats = _stats(request, units)
    fields = _fields(request, at, output, saved, stats)
    status = functions.nw_recurrent_forward(FORWARD.pack(*fields, h.data_ptr(), address(c)))
    if status:
        raise_fault(status)
    kept = output
    if given.dtype is not _WIDE:
        output, h, c = output.to(given.dtype), h.to(given.dtype), None if c is None else c.to(given.dtype)
        kept = kept if config.cell != "lstm" else output
    if request.reverse and layout.flip is not None:
        output = output.index_select(0, layout.flip)
    of_steps = stats if config.norm == "batch" and request.running is None else None
    moments = {} if of_steps is None else _moments(config, units, layout, of_steps)
    all_saved = (kept, *saved, *([] if of_steps is None else [of_steps])) if needs_grad else ()
    return LayerResult(output, h, c, moments, all_saved)


def backward(
    request: LayerRequest,
    saved: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of x, h0, c0 and the weights from those of the output, h and c, of which None stands for zeros."""
    given = request.x
    at = _readable(request)
    x, h0, c0, units = at.x, at.h0, at.c0, at.units
    output, kept = _readable_saved(request.config, x, units, given.dtype, saved[: len(SAVED)])
    stats = _stats(request, units, saved[-1] if len(saved) > len(SAVED) else None)
    flip = request.layout.flip if request.reverse else None
    doutput, dh, dc = grads
    if doutput is not None:
        _expect("doutput", doutput, (*given.shape[:-1], units), (_WIDE, given.dtype))
        doutput = _wide(_flipped(doutput, flip))
    dh = _fresh("dh", dh, h0)
    dc = None if c0 is None else _fresh("dc", dc, c0)
    dx = torch.empty_like(x) if needs[0] else None
    found: list[Tensor | None] = [None] * len(at.weights)
    if any(needs[3:]):
        found = [None if w is None else torch.empty_like(w) for w in at.weights]
    fields = _fields(request, at, output, kept, stats)
    pointers = [address(t) for t in (doutput, dh, dc, dx, *found)]
    status = functions.nw_recurrent_backward(BACKWARD.pack(*fields, *pointers))
    if status:
        raise_fault(status)
    if dx is not None:
        dx = _flipped(dx if dx.dtype is given.dtype else dx.to(given.dtype), flip)
    by_name = dict(zip(_ORDER, found, strict=True))
    by_name["gain_sum"] = by_name["gain_hh"]
    named = zip(Weights._fields, request.weights, strict=True)
    of_weights = [_as(by_name.get(name), w) if w is not None else None for name, w in named]
    return [dx, _as(dh, request.h0), _as(dc, request.c0), *of_weights]


class _Readable(NamedTuple):
    """The tensors of a request as the kernel reads them: contiguous, in float32, rows in the order of processing."""

    x: Tensor
    h0: Tensor
    c0: Tensor | None
    weights: list[Tensor | None]  # in the struct's order
    batch_sizes: Tensor | None
    reset: Tensor | None
    rows: int
    units: int


def _readable(request: LayerRequest) -> _Readable:
    """Raises ValueError where a tensor is not of the shape that the kernel will read."""
    config, x, h0, c0, w, layout, reverse, reset, *_ = request
    units, inputs, batch = w.weight_hh.shape[1], x.shape[-1], layout.batch
    stacked = config.gates * units
    matrix, vector = (x.dtype,), (x.dtype, _WIDE)
    _expect("weight_ih", w.weight_ih, (stacked, inputs), matrix)
    _expect("weight_hh", w.weight_hh, (stacked, units), matrix)
    ordered = [
        w.weight_ih,
        w.weight_hh,
        w.bias_ih,
        w.bias_hh,
        w.gain_ih,
        w.gain_hh if w.gain_sum is None else w.gain_sum,
        w.bias_inner,
        w.gain_c,
        w.bias_c,
    ]
    for name, vector_given in zip(_ORDER[2:], ordered[2:], strict=True):
        if vector_given is not None:
            _expect(name, vector_given, (units if name in ("gain_c", "bias_c") else stacked,), vector)
    _expect("h0", h0, (batch, units), matrix)
    if (c0 is None) == (config.cell == "lstm"):
        raise ValueError("an LSTM, and it alone, has a cell state c0")
    if c0 is not None:
        _expect("c0", c0, (batch, units), matrix)
        c0 = _wide(c0)
    sizes, flip = layout.batch_sizes, layout.flip if reverse else None
    if sizes is None:
        rows = layout.steps * batch
        shape: tuple[int, ...] = (layout.steps, batch)
    else:
        _expect("batch_sizes", sizes, (layout.steps,), (torch.int64,))
        rows, sizes = int(sizes.sum()), sizes.contiguous()
        shape = (rows,)
        if reverse and flip is None:
            raise ValueError("flip: missing; packed rows run backwards by it")
        if flip is not None:
            _expect("flip", flip, shape, (torch.int64,))
    _expect("x", x, (*shape, inputs), (_WIDE, torch.bfloat16))
    if reset is not None:
        _expect("reset", reset, shape, (torch.bool,))
        reset = _flipped(reset, flip).contiguous()
    weights = [None if t is None else _wide(t) for t in ordered]
    return _Readable(_wide(_flipped(x, flip)), _wide(h0), c0, weights, sizes, reset, rows, units)


def _readable_saved(
    config: Recurrence, x: Tensor, units: int, dtype: torch.dtype, saved: Sequence[Tensor | None]
) -> tuple[Tensor, list[Tensor | None]]:
    """What the forward kept, contiguous: hooks on saved tensors may have put others in its place."""
    output, *kept = saved
    widths = saved_widths(config, x.shape[-1], units, dtype)
    if output is None:
        raise ValueError("output: missing; the forward keeps it with needs_grad=True")
    rows = prod(x.shape[:-1])
    if output.dim() > 2:
        _expect("output", output, (*x.shape[:-1], units), (_WIDE if widths[4] else dtype,))
        output = output.flatten(0, -2)
    _expect("output", output, (rows, units), (_WIDE if widths[4] else dtype,))
    for name, t, width in zip(SAVED[1:], kept, widths[:4], strict=True):
        if t is not None:
            _expect(name, t, (rows, width), (_WIDE,))
        elif width:
            raise ValueError(f"{name}: missing; the forward keeps it with needs_grad=True")
    return _wide(output), [None if t is None else _wide(t) for t in kept]


def _expect(name: str, t: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    if t.shape != shape or t.dtype not in dtypes or not t.is_cpu:
        found = f"{tuple(t.shape)} of {t.dtype} on {t.device}"
        accepted = " or ".join(map(str, dict.fromkeys(dtypes)))
        raise ValueError(f"{name}: expected {tuple(shape)} of {accepted} on the CPU, but got {found}")


def _flipped(rows: Tensor, flip: Tensor | None) -> Tensor:
    return rows if flip is None else rows.index_select(0, flip)


def _wide(t: Tensor) -> Tensor:
    if t.dtype is _WIDE and t.is_contiguous() and not t.is_neg():
        return t
    return t.to(_WIDE).resolve_neg().contiguous()


def _fresh(name: str, grad: Tensor | None, state: Tensor) -> Tensor:
    """A copy, or zeros, since the kernel writes its result over it."""
    if grad is None:
        return torch.zeros_like(state)
    _expect(name, grad, tuple(state.shape), (_WIDE, torch.bfloat16))
    return torch.empty_like(state).copy_(grad)


def _as(grad: Tensor | None, given: Tensor | None) -> Tensor | None:
    """A gradient in the dtype of what it belongs to."""
    if grad is None or given is None or grad.dtype is given.dtype:
        return grad
    return grad.to(given.dtype)


def _stats(request: LayerRequest, units: int, kept: Tensor | None = None) -> Tensor | None:
    """Batch norm: the kernel's rows of means and variances, (2, rows, features): room for those of each step, or what
    the forward `kept` of them; from tables the rows that the steps read."""
    config, running, steps = request.config, request.running, request.layout.steps
    if config.norm != "batch":
        return None
    features = sum(config.sites(units).values())
    if running is None:
        if kept is None:
            return torch.empty((2, steps, features), dtype=_WIDE, device="cpu")
        _expect("statistics", kept, (2, steps, features), (_WIDE,))
        return _wide(kept)
    columns = []
    for site, width in config.sites(units).items():
        tables = running[site]
        rows = len(tables[0])
        first = min(request.start_step, rows - 1)
        last = min(max(request.start_step + steps, first + 1), rows)
        for what, table in zip(("mean", "variance"), tables, strict=True):
            _expect(f"running {what} of {site}", table, (rows, width), (_WIDE,))
        columns.append(torch.stack([table[first:last] for table in tables]))
    return _wide(torch.cat(columns, -1))


def _moments(config: Recurrence, units: int, layout: Layout, stats: Tensor) -> dict[str, Moments]:
    """The statistics of the steps, by site."""
    sizes = layout.batch_sizes
    count = stats.new_full((layout.steps, 1), layout.batch) if sizes is None else sizes.to(_WIDE).unsqueeze(1)
    sites = config.sites(units)
    mean, var = (t.split(list(sites.values()), -1) for t in stats)
    return {site: Moments(m, v, count) for site, m, v in zip(sites, mean, var, strict=True)}


def _fields(
    request: LayerRequest, at: _Readable, output: Tensor, saved: Sequence[Tensor | None], stats: Tensor | None
) -> list[int | float]:
    """The fields of nw_recurrent."""
    config, layout = request.config, request.layout
    pointers = (at.x, at.batch_sizes, at.reset, *at.weights, at.h0, at.c0, output, *saved)
    return [
        *[address(t) for t in pointers],
        *((0, 0) if stats is None else (stats[0].data_ptr(), stats[1].data_ptr())),
        layout.steps,
        layout.batch,
        at.rows,
        at.x.shape[-1],
        at.units,
        0 if stats is None else stats.shape[1],
        *_settings(config, request.reverse and at.batch_sizes is None, request.running is not None),
        torch.get_num_threads(),
        DTYPES[request.x.dtype],
    ]


@cache
def _settings(config: Recurrence, reverse: bool, given: bool) -> tuple[int | float, ...]:
    """From `eps` to `groups`; `given`: batch norm takes statistics from tables."""
    unnormalized = config.norm is None
    groups = () if unnormalized else config.groups or (config.gates,)
    return (
        config.eps,
        config.update_offset,
        DTYPES[_WIDE],
        _CELLS[f"rnn_{config.nonlinearity}" if config.cell == "rnn" else config.cell],
        _PLACEMENTS[None if unnormalized else config.norm_placement],
        _OF_ROW if config.norm != "batch" else _GIVEN if given else _OF_STEP,
        config.norm == "layer",
        _CELL_NORMS[config.cell_norm],
        not config.reset_after,
        config.update_gate == "paper",
        reverse,
        *groups,
        *[0] * (4 - len(groups)),
    )


@cache
def saved_widths(config: Recurrence, inputs: int, units: int, dtype: torch.dtype) -> tuple[int, ...]:
    """The columns of what a forward keeps, 0 for None, for inputs of `dtype`: `SAVED` without the output, and then the
    output where it is kept in float32 beside the rounded one."""
    nowhere, counts = [0] * 21, (0, 0, 0, inputs, units, 0)
    description = _RECURRENT.pack(*nowhere, *counts, *_settings(config, False, False), 1, DTYPES[dtype])
    widths = (ctypes.c_int64 * 4)()
    function = library.library().nw_recurrent_saves
    function.argtypes, function.restype = [ctypes.c_char_p, ctypes.c_void_p], ctypes.c_int
    status = function(description, widths)
    if status:
        raise_fault(status)
    # An LSTM's backward only multiplies its output, rounded as it was returned; others find a gate's slope by it.
    return *widths, 0 if dtype == _WIDE or config.cell == "lstm" else units


def saves(config: Recurrence, inputs: int, units: int, dtype: torch.dtype) -> tuple[Saved, ...]:
    """Of `SAVED`."""
    *widths, wide_output = saved_widths(config, inputs, units, dtype)
    output = Saved(units, _WIDE) if wide_output else Saved(units, dtype, is_output=True)
    return output, *[Saved(width, _WIDE) for width in widths]


KERNELS = {"layer": LayerKernel(forward, backward, saves)}
