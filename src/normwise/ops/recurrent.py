"""Recurrent layers: which backend runs one layer in one direction, and how layers and directions stack."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from normwise.ops import check, recurrent_cpu, recurrent_loop, recurrent_registered
from normwise.ops.choose import Call, choose, compiles_plain, forced, transforming, values_visible
from normwise.ops.choose import plain as choose_plain
from normwise.reference import recurrent as reference
from normwise.reference.moments import Moments
from normwise.reference.recurrence import Recurrence, Weights
from normwise.reference.recurrent import Result, Running
from normwise.reference.sequences import valid_steps


class Stacked(NamedTuple):
    """What a stack of layers gives.

    output: (T, B, D * H) of the last layer, D directions side by side.
    h, c: (L * D, B, H) final states, layer by layer; `c` is None without a cell state.
    statistics: for each layer and direction the batch moments by site, see `reference.recurrent.Result`.
    """

    output: Tensor
    h: Tensor
    c: Tensor | None
    statistics: list[dict[str, Moments]]


def recurrence(
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: Weights,
    how: Recurrence,
    *,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    reverse: bool = False,
    zoned: Tensor | None = None,
    running: Running | None = None,
    first: int = 0,
    writable: bool = False,
) -> Result:
    """One layer in one direction, by the chosen backend. See `reference.recurrent.recurrence` for every argument.

    writable: the output is the caller's to change in place; see `recurrent_cpu.recurrence`.
    """
    if recurrent_registered.fits(x, weights, how, zoned):
        return recurrent_registered.recurrence(
            x, h0, c0, weights, how, lengths=lengths, reset=reset, reverse=reverse, writable=writable
        )
    uncompiled = recurrent_cpu.obstacle(x, weights, how, zoned, h0, c0, lengths, reset)
    if uncompiled is None and choose_plain(x) and compiles_plain(x):
        backend = "cpu"
    else:
        backend = choose(Call("recurrence", x, (), uncompiled=uncompiled)).backend
    if backend == "cpu":
        return recurrent_cpu.recurrence(
            x, h0, c0, weights, how, lengths=lengths, reset=reset, reverse=reverse, writable=writable
        )
    run = reference.recurrence if backend == "reference" else recurrent_loop.recurrence
    return run(
        x,
        h0,
        c0,
        weights,
        how,
        lengths=lengths,
        reset=reset,
        reverse=reverse,
        zoned=zoned,
        running=running,
        first=first,
    )


def stack(
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: Sequence[Weights],
    how: Recurrence,
    *,
    bidirectional: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    running: Sequence[Running] | None = None,
    first: int = 0,
) -> Stacked:
    """Layers on top of each other, each in one or both directions.

    Args:
        x: (T, B, I).
        h0, c0: (L * D, B, H) initial states, layer by layer, forward before backward.
        weights: L * D of them, in the same order.
        how: the recurrence, the same for all.
        dropout: probability of an element to be zeroed between layers, in training.
        training: dropout and zoneout draw; batch norm takes the batch's statistics.
        lengths: (B,) integers, valid steps of each sample.
        reset: (T, B) bool, True where the state is zeroed between steps t-1 and t.
        running: batch norm's tables for each of `weights`; None takes the batch's statistics.
        first: the index of the first step in these tables.

    Raises:
        RuntimeError: no step at all.
        ValueError: batch statistics of a single sample.
    """
    if x.shape[0] == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN: leave empty batches of steps out")
    for parameters in weights:
        check.beside(x, h0=h0, c0=c0, reset=reset, **parameters._asdict())
    if how.norm == "batch" and running is None:
        _enough_samples(x, lengths, how)
    x, h0, c0, weights, autocast = _cast_for_autocast(x, h0, c0, weights)
    directions = 2 if bidirectional else 1
    results: list[Result] = []
    with autocast:
        for k in range(0, len(weights), directions):
            if k and training and dropout:
                x = F.dropout(x, dropout)
            layer = [
                recurrence(
                    x,
                    h0[n],
                    None if c0 is None else c0[n],
                    weights[n],
                    how,
                    lengths=lengths,
                    reset=reset,
                    reverse=n > k,
                    zoned=_zoned(x, h0, how) if training else None,
                    running=None if running is None else running[n],
                    first=first,
                    writable=directions == 1 and k + 1 == len(weights),
                )
                for n in range(k, k + directions)
            ]
            results += layer
            x = layer[0].output if directions == 1 else torch.cat([r.output for r in layer], -1)
    h = torch.stack([r.h for r in results])
    c = None if c0 is None else torch.stack([r.c for r in results])  # type: ignore[misc]
    return Stacked(x, h, c, [r.statistics for r in results])


# torch's own recurrent layers, by the cell and the nonlinearity.
_ATEN: dict[tuple[str, str], Callable[..., tuple[Tensor, ...]]] = {
    ("lstm", "tanh"): torch._VF.lstm,
    ("gru", "tanh"): torch._VF.gru,
    ("rnn", "tanh"): torch._VF.rnn_tanh,
    ("rnn", "relu"): torch._VF.rnn_relu,
}


def is_plain(how: Recurrence, reset: Tensor | None) -> bool:
    """Whether torch's own layer does the whole job: no norm, no zoneout, no reset, and no other backend forced."""
    if how.norm is not None or reset is not None:
        return False
    # eps and the start of a bias change nothing without a norm.
    same = Recurrence(how.cell, None, eps=how.eps, forget_bias=how.forget_bias, nonlinearity=how.nonlinearity)
    return how == same and forced() in (None, "torch") and not transforming()


# Multiplications in a layer up to which ATen's one call costs less than what Python does around our kernel.
_FEW_PRODUCTS = 1 << 19


def compiled_plain(x: Tensor | PackedSequence, weights: Sequence[Weights], how: Recurrence) -> bool:
    """Whether `stack`, with our kernels, is the faster way to run what `is_plain`: padded input that is not small."""
    if isinstance(x, PackedSequence) or forced() is not None or x.dim() != 3:
        return False
    products = x.shape[0] * x.shape[1] * min(w.weight_ih.numel() + w.weight_hh.numel() for w in weights)
    if products < _FEW_PRODUCTS:
        return False
    uncompiled = next((o for w in weights if (o := recurrent_cpu.obstacle(x, w, how, None))), None)
    return choose(Call("recurrence", x, (), uncompiled=uncompiled)).backend == "cpu"


def _as_it_is(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which torch.compile calls without looking inside: torch.compiler.disable at the first call.

    Not earlier, because torch.compiler.disable loads the compiler, which costs a second.
    """
    disabled: Callable[..., Any] | None = None

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal disabled
        if not torch.compiler.is_compiling():
            return function(*args, **kwargs)
        if disabled is None:
            disabled = torch.compiler.disable(function)
        return disabled(*args, **kwargs)

    return call


@_as_it_is
def plain(
    x: Tensor | PackedSequence,
    h0: Tensor,
    c0: Tensor | None,
    weights: Sequence[Weights],
    how: Recurrence,
    *,
    bidirectional: bool = False,
    dropout: float = 0.0,
    training: bool = False,
) -> tuple[Any, Tensor, Tensor | None]:
    """(output, h, c) of `stack` by torch's own multi-layer kernel, where `is_plain`; packed in gives packed out.

    A compiled model calls it as it is: torch.compile does the same with torch.nn's layers, and the compiler's own
    code for them may not even run.
    """
    flat = [w for layer in weights for w in layer if w is not None]
    tail = (flat, weights[0].bias_ih is not None, len(weights) // (1 + bidirectional), dropout, training, bidirectional)
    run = _ATEN[how.cell, how.nonlinearity]
    if not isinstance(x, PackedSequence):
        output, *finals = run(x, h0 if c0 is None else (h0, c0), *tail, False)
        return output, finals[0], None if c0 is None else finals[1]
    order, back = x.sorted_indices, x.unsorted_indices
    if order is not None:
        h0, c0 = h0[:, order], None if c0 is None else c0[:, order]
    data, *finals = run(x.data, x.batch_sizes, h0 if c0 is None else (h0, c0), *tail)
    if back is not None:
        finals = [s[:, back] for s in finals]
    return x._replace(data=data), finals[0], None if c0 is None else finals[1]


@_as_it_is
def plain_padded(
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: Sequence[Weights],
    how: Recurrence,
    lengths: Tensor,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`plain` on padded sequences of different lengths, some perhaps empty."""
    valid = valid_steps(len(x), lengths)
    # A packed sequence has at least one step: an empty one runs over a zero, and what came of it is put back.
    x = x.masked_fill(~valid[..., None], 0)
    packed = pack_padded_sequence(x, lengths.clamp(min=1).cpu(), enforce_sorted=False)
    output, h, c = plain(packed, h0, c0, weights, how, **options)
    padded, _ = pad_packed_sequence(output, total_length=len(x))
    started = (lengths > 0)[:, None]
    return (
        padded.masked_fill(~valid[..., None], 0),
        torch.where(started, h, h0.to(h.dtype)),
        None if c is None or c0 is None else torch.where(started, c, c0.to(c.dtype)),
    )


def unpack(packed: PackedSequence) -> tuple[Tensor, Tensor]:
    """(padded (T, B, I), lengths (B,)) in the order in which the sequences were given."""
    x, lengths = pad_packed_sequence(packed)
    return x, lengths.to(x.device)


def pack_like(output: Tensor, lengths: Tensor, packed: PackedSequence) -> PackedSequence:
    """Pack padded (T, B, H) as `packed` was, with its very order of sequences."""
    if packed.sorted_indices is not None:
        output, lengths = output[:, packed.sorted_indices], lengths[packed.sorted_indices]
    data = pack_padded_sequence(output, lengths.cpu(), enforce_sorted=True).data
    return packed._replace(data=data)


def checked_lengths(lengths: Any, steps: int, batch: int, device: torch.device, batched: bool = True) -> Tensor:
    """`lengths` as int64 on `device`; without a batch a single number will do. Raises as `check.one_length_each`."""
    if not batched:
        lengths = check.lengths_tensor(lengths).reshape(-1)
    return check.one_length_each(lengths, batch, steps, "the input").to(device, torch.int64)


def checked_reset(reset: Any, expected: tuple[int, ...], layout: str, device: torch.device) -> Tensor:
    """`reset` as a bool tensor, if it is one, or a list or array, of the `expected` shape, which `layout` names."""
    flags = check.bool_tensor("reset", reset, "True where an episode starts", device)
    if tuple(flags.shape) != expected:
        raise check.ShapeError(
            f"reset must be of shape {expected}, {layout} as the input, but got {tuple(flags.shape)}"
        )
    return flags


def _zoned(x: Tensor, h0: Tensor, how: Recurrence) -> Tensor | None:
    """Which units zoneout keeps at which step; None without zoneout."""
    if not how.zoneout:
        return None
    return torch.rand(*x.shape[:2], h0.shape[-1], device=x.device) < how.zoneout


def _enough_samples(x: Tensor, lengths: Tensor | None, how: Recurrence) -> None:
    """The statistics of a step are over samples: a single one has no deviation."""
    steps, batch = x.shape[:2]
    sequence_wise = how.statistics == "sequence"
    values = batch * steps if sequence_wise else batch
    if lengths is not None and values_visible(lengths):
        values = int(lengths.sum() if sequence_wise else (lengths > 0).sum())
    check.more_than_one(
        values,
        x,
        "Ways out: norm='layer' or 'rms', which need no batch; eval mode (model.eval() "
        "uses the running statistics); or DataLoader(drop_last=True) if only the last batch is this small.",
    )


def _cast_for_autocast(
    x: Tensor, h0: Tensor, c0: Tensor | None, weights: Sequence[Weights]
) -> tuple[Tensor, Tensor, Tensor | None, Sequence[Weights], AbstractContextManager[None]]:
    """Under autocast all in its dtype, as torch's own layers do; norms and states stay in float32 inside the loop."""
    kind = x.device.type
    if not _has_autocast(kind) or not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return x, h0, c0, weights, nullcontext()
    dtype = torch.get_autocast_dtype(kind)
    matrices = ("weight_ih", "weight_hh", "weight_hr")
    cast = [w._replace(**{m: v.to(dtype) for m in matrices if (v := getattr(w, m)) is not None}) for w in weights]
    return x.to(dtype), h0.to(dtype), None if c0 is None else c0.to(dtype), cast, torch.autocast(kind, enabled=False)


def _has_autocast(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind)


# torch.compile of 2.11 cannot look into it. This is what torch.compiler.assume_constant_result does; calling that here
# would load the compiler, which costs a second.
_has_autocast._dynamo_marked_constant = True  # type: ignore[attr-defined]
