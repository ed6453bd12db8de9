"""The compiled recurrent kernels as functions of tensors: check, allocate, call.

One layer in one direction, all steps in one call; csrc/include/normwise.h has the equations. Rows are (step, sample)
pairs as in torch's PackedSequence; where all sequences are of one length, x, the output and their gradients may be
(steps, batch, features) instead of (rows, features). Nothing here knows of autograd.

All is float32, or x, the state and the two matrices are bfloat16 and the vectors bfloat16 or float32. With bfloat16
matrices are multiplied in it, and everything else is computed, and kept for the backward, in float32; results and
gradients come in the dtype of what they belong to.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from normwise.kernels.arguments import DTYPES
from normwise.kernels.library import fault, load
from normwise.kernels.structs import RECURRENT, RECURRENT_BACKWARD, RECURRENT_FORWARD, packer

_RECURRENT = packer(RECURRENT)
_FORWARD, _BACKWARD = packer(RECURRENT_FORWARD), packer(RECURRENT_BACKWARD)
STRUCTS = (_FORWARD, _BACKWARD)

CELLS = {"lstm": 0, "gru": 1, "rnn_tanh": 2, "rnn_relu": 3}
TERMS = {"plain": 0, "separate": 1, "sum": 2}
CELL_NORMS: dict[str | None, int] = {None: 0, "output": 1, "carried": 2}
_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


class Layer(NamedTuple):
    """The recurrence: see the head of the recurrent part of normwise.h, whose words these are."""

    cell: str
    terms: str = "plain"
    center: bool = True
    cell_norm: str | None = None
    groups: tuple[int, ...] = ()  # () is one group of all gates
    eps: float = 1e-5
    reset_candidate: bool = False
    update_paper: bool = False
    update_offset: float = 0.0


class Weights(NamedTuple):
    """Parameters, or their gradients. With terms="sum" the norm's gain is `gain_hh`."""

    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor | None = None
    bias_hh: Tensor | None = None
    gain_ih: Tensor | None = None
    gain_hh: Tensor | None = None
    bias_inner: Tensor | None = None
    gain_c: Tensor | None = None
    bias_c: Tensor | None = None


class Steps(NamedTuple):
    """Where the rows lie: `batch_sizes` (steps,) int64, falling, or None for `batch` rows at each of `steps` steps.

    `reset` (rows,): bool, True where the state is zeroed before that row. `reverse`: from the last step to the first.
    """

    steps: int
    batch: int
    batch_sizes: Tensor | None = None
    reset: Tensor | None = None
    reverse: bool = False


class Saved(NamedTuple):
    """What the forward keeps for the backward; None where the recurrence does not need it."""

    input_terms: Tensor | None = None
    hidden_terms: Tensor | None = None
    cells: Tensor | None = None
    stats: Tensor | None = None
    output: Tensor | None = None  # (rows, units) in float32, where the caller's is rounded and that is not enough


class Result(NamedTuple):
    output: Tensor  # like x, no view of another tensor
    h: Tensor  # (batch, units)
    c: Tensor | None
    saved: Saved


class Gradients(NamedTuple):
    x: Tensor | None
    h0: Tensor
    c0: Tensor | None
    weights: Weights | None


def forward(
    layer: Layer, weights: Weights, x: Tensor, h0: Tensor, c0: Tensor | None, steps: Steps, *, save: bool
) -> Result:
    """All steps from x (rows, inputs) and the state (batch, units); keeps what `backward` needs if `save`."""
    dtype = x.dtype
    x, h0, c0, weights, steps = _checked(layer, weights, x, h0, c0, steps)
    units = weights.weight_hh.shape[1]
    output = torch.empty((*x.shape[:-1], units), dtype=torch.float32, device="cpu")  # whatever the defaults are
    saved, unrounded = Saved(), 0
    if save:
        *widths, unrounded = saved_widths(layer, x.shape[-1], units, dtype)
        rows = math.prod(x.shape[:-1])
        saved = Saved(*[output.new_empty((rows, width)) if width else None for width in widths])
    h = torch.empty_like(h0)
    c = None if c0 is None else torch.empty_like(c0)
    arguments = _arguments(layer, weights, x, h0, c0, steps, output, saved, dtype)
    _call("nw_recurrent_forward", _FORWARD.pack(*arguments, _at(h), _at(c)))
    if dtype is torch.float32:
        return Result(output, h, c, saved)
    if unrounded:
        saved = saved._replace(output=output.view(-1, units))
    return Result(output.to(dtype), h.to(dtype), None if c is None else c.to(dtype), saved)


def backward(
    layer: Layer,
    weights: Weights,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    steps: Steps,
    output: Tensor | None,
    saved: Saved,
    doutput: Tensor | None,
    dh: Tensor | None,
    dc: Tensor | None,
    *,
    needs_x: bool = True,
    needs_weights: bool = True,
) -> Gradients:
    """Gradients from those of the forward's output, h and c; None stands for zeros.

    `output` may be None where `saved` has it.
    """
    dtype, given = x.dtype, weights
    x, h0, c0, weights, steps = _checked(layer, weights, x, h0, c0, steps)
    units = weights.weight_hh.shape[1]
    output, saved = _checked_saved(layer, x, units, dtype, output, saved)
    if doutput is not None:
        doutput = _wide(doutput)
        _expect("doutput", doutput, (*x.shape[:-1], units), (output.dtype,))
    dh = torch.zeros_like(h0) if dh is None else _fresh(dh)
    _expect("dh", dh, h0.shape, (h0.dtype,))
    if c0 is not None:
        dc = torch.zeros_like(c0) if dc is None else _fresh(dc)
        _expect("dc", dc, c0.shape, (c0.dtype,))
    else:
        dc = None
    dx = torch.empty_like(x) if needs_x else None
    gradients = None
    if needs_weights:
        gradients = Weights(*[None if w is None else torch.empty_like(w) for w in weights])  # type: ignore[arg-type]
    arguments = _arguments(layer, weights, x, h0, c0, steps, output, saved, dtype)
    at = [0] * len(weights) if gradients is None else [_at(g) for g in gradients]
    _call("nw_recurrent_backward", _BACKWARD.pack(*arguments, _at(doutput), _at(dh), _at(dc), _at(dx), *at))
    if dtype is torch.float32:
        return Gradients(dx, dh, dc, gradients)
    if gradients is not None:
        pairs = zip(gradients, given, strict=True)
        gradients = Weights(*(None if g is None or w is None else g.to(w.dtype) for g, w in pairs))  # type: ignore[arg-type]
    return Gradients(
        None if dx is None else dx.to(dtype), dh.to(dtype), None if dc is None else dc.to(dtype), gradients
    )


def _checked(
    layer: Layer, weights: Weights, x: Tensor, h0: Tensor, c0: Tensor | None, steps: Steps
) -> tuple[Tensor, Tensor, Tensor | None, Weights, Steps]:
    """Everything contiguous, in float32, and of the shapes that the kernel will read."""
    units, inputs = weights.weight_hh.shape[1], x.shape[-1]
    stacked = _GATES[layer.cell] * units
    matrix, vector = (x.dtype,), (x.dtype, torch.float32)
    _expect("weight_ih", weights.weight_ih, (stacked, inputs), matrix)
    _expect("weight_hh", weights.weight_hh, (stacked, units), matrix)
    for name, w in zip(Weights._fields[2:], weights[2:], strict=True):
        if w is not None:
            _expect(name, w, (units if name in ("gain_c", "bias_c") else stacked,), vector)
    state = (steps.batch, units)
    _expect("h0", h0, state, matrix)
    if (c0 is None) == (layer.cell == "lstm"):
        raise ValueError("an LSTM, and it alone, has a cell state c0")
    if c0 is not None:
        _expect("c0", c0, state, matrix)
        c0 = _wide(c0)
    rows = steps.steps * steps.batch
    if steps.batch_sizes is not None:
        sizes = steps.batch_sizes
        _expect("batch_sizes", sizes, (steps.steps,), (torch.int64,))
        rows = int(sizes.sum())
        steps = steps._replace(batch_sizes=sizes.contiguous())
    shape = (rows, inputs) if x.dim() == 2 or steps.batch_sizes is not None else (steps.steps, steps.batch, inputs)
    _expect("x", x, shape, (torch.float32, torch.bfloat16))
    if steps.reset is not None:
        _expect("reset", steps.reset, (rows,), (torch.bool,))
        steps = steps._replace(reset=steps.reset.contiguous())
    weights = Weights(*[None if w is None else _wide(w) for w in weights])  # type: ignore[arg-type]
    return _wide(x), _wide(h0), c0, weights, steps


def _checked_saved(
    layer: Layer, x: Tensor, units: int, dtype: torch.dtype, output: Tensor | None, saved: Saved
) -> tuple[Tensor, Saved]:
    """The forward's output and what it kept, contiguous: hooks on saved tensors may have put others in their place."""
    rows, widths = math.prod(x.shape[:-1]), saved_widths(layer, x.shape[-1], units, dtype)
    for name, t, width in zip(Saved._fields, saved, widths, strict=True):
        if t is not None:
            _expect(name, t, (rows, width), (torch.float32,))
        elif width:
            raise ValueError(f"{name}: missing; the forward keeps it with save=True")
    if saved.output is not None:
        output = saved.output
    elif output is None:
        raise ValueError("output: missing; the backward needs the forward's")
    else:
        _expect("output", output, (*x.shape[:-1], units), (dtype,))
    return _wide(output), Saved(*[None if t is None else _wide(t) for t in saved])


def _expect(name: str, t: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    if t.shape != shape or t.dtype not in dtypes or not t.is_cpu:
        found = f"{tuple(t.shape)} of {t.dtype} on {t.device}"
        accepted = " or ".join(map(str, dict.fromkeys(dtypes)))
        raise ValueError(f"{name}: expected {tuple(shape)} of {accepted} on the CPU, but got {found}")


def _wide(t: Tensor) -> Tensor:
    if t.dtype is torch.float32 and t.is_contiguous() and not t.is_neg():
        return t
    return t.to(torch.float32).resolve_neg().contiguous()


def _fresh(t: Tensor) -> Tensor:
    """A copy, since the kernel writes its result over it."""
    return torch.empty(t.shape, dtype=torch.float32, device="cpu").copy_(t)


def _at(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _arguments(
    layer: Layer,
    weights: Weights,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    steps: Steps,
    output: Tensor,
    saved: Saved,
    products: torch.dtype,
) -> list[int | float]:
    """The fields of nw_recurrent, all tensors in float32."""
    return [
        x.data_ptr(),
        _at(steps.batch_sizes),
        _at(steps.reset),
        *[_at(w) for w in weights],
        h0.data_ptr(),
        _at(c0),
        output.data_ptr(),
        *[_at(t) for t in saved[:-1]],
        steps.steps,
        steps.batch,
        math.prod(x.shape[:-1]),
        x.shape[-1],
        weights.weight_hh.shape[1],
        layer.eps,
        layer.update_offset,
        *_codes(layer),
        steps.reverse,
        *_group_sizes(layer),
        torch.get_num_threads(),
        DTYPES[products],
    ]


@cache
def _codes(layer: Layer) -> tuple[int, ...]:
    return (
        DTYPES[torch.float32],
        CELLS[layer.cell],
        TERMS[layer.terms],
        layer.center,
        CELL_NORMS[layer.cell_norm],
        layer.reset_candidate,
        layer.update_paper,
    )


@cache
def _group_sizes(layer: Layer) -> tuple[int, ...]:
    groups = () if layer.terms == "plain" else layer.groups or (_GATES[layer.cell],)
    return *groups, *[0] * (4 - len(groups))


@cache
def saved_widths(layer: Layer, inputs: int, units: int, dtype: torch.dtype) -> tuple[int, ...]:
    """The columns of each field of `Saved`, 0 for None, for inputs of `dtype`."""
    nothing = torch.empty(0, device="cpu")
    shape = Steps(0, 0)
    weights = Weights(nothing, nothing.new_empty((0, units)))
    description = _arguments(
        layer, weights, nothing.new_empty((0, inputs)), nothing, None, shape, nothing, Saved(), dtype
    )
    widths = (ctypes.c_int64 * 4)()
    function = _library().nw_recurrent_saves
    function.argtypes, function.restype = [ctypes.c_char_p, ctypes.c_void_p], ctypes.c_int
    status = function(_RECURRENT.pack(*description), widths)
    if status:
        raise fault(status)
    # An LSTM's backward only multiplies its output, rounded as it was returned; others find a gate's slope by it.
    return *widths, 0 if dtype == torch.float32 or layer.cell == "lstm" else units


def _library() -> ctypes.CDLL:
    library, why = load()
    if library is None:
        raise RuntimeError(f"the C++ kernels are not available: {why}")
    return library


@cache
def _function(name: str) -> Callable[[bytes], int]:
    function = getattr(_library(), name)
    function.argtypes, function.restype = [ctypes.c_char_p], ctypes.c_int
    return function  # type: ignore[no-any-return]


def _call(name: str, arguments: bytes) -> None:
    status = _function(name)(arguments)
    if status:
        raise fault(status)
