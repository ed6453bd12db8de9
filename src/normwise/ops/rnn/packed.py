"""Sequences as packed rows: once on the way in, through all layers and directions, and once on the way out."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from normwise.backends.devices import on_cpu
from normwise.backends.protocol import Layout
from normwise.backends.reference.sequences import valid_steps
from normwise.ops import ragged
from normwise.ops.autograd import put_rows, take_rows
from normwise.ops.dispatch import have_values, is_traced_or_transformed, values_visible


class Sequences(NamedTuple):
    """A batch of sequences in one of the forms of `Layout`, and how to undo it.

    x: the rows.
    layout: where they lie.
    order: (batch,) the sample at each place of a packed batch; None: as given.
    source: (rows,) where each packed row was in the padded input, (steps, batch) or, batch first, (batch, steps).
    packed: the input, if it was a PackedSequence.
    jagged: the input, if it was a jagged tensor, of whose rows `source` then speaks.
    """

    x: Tensor
    layout: Layout
    order: Tensor | None = None
    source: Tensor | None = None
    packed: PackedSequence | None = None
    jagged: Tensor | None = None


def padded(x: Tensor, lengths: Tensor | None, batch_first: bool, bidirectional: bool) -> Sequences:
    """(T, B, I), or (B, T, I) `batch_first`, as rows: packed if lengths differ, else dense."""
    if lengths is not None and may_look(x, lengths):
        return pack(x, lengths, batch_first, bidirectional)
    x = x.transpose(0, 1) if batch_first else x
    if lengths is None:
        return Sequences(x, Layout(x.shape[0], x.shape[1]))
    known, on_device = lengths if on_cpu(lengths) else None, lengths.to(x.device, non_blocking=True)
    layout = Layout(x.shape[0], x.shape[1], lengths=on_device, visible=False, lengths_on_cpu=known)
    return Sequences(x, layout)


def pack(x: Tensor, lengths: Tensor, batch_first: bool, bidirectional: bool) -> Sequences:
    """`padded`, where the values of `lengths` may be looked at."""
    steps_first = x.transpose(0, 1) if batch_first else x
    steps, batch = steps_first.shape[:2]
    lengths = lengths.cpu()
    longest = int(lengths.max()) if batch else steps
    if longest and (not batch or int(lengths.min()) == longest):
        return Sequences(steps_first[:longest], Layout(longest, batch))
    sample = torch.arange(batch, device="cpu")
    first, stride = (sample * steps, 1) if batch_first else (sample, batch)
    return _by_length(x.flatten(0, 1), lengths, first, stride, longest, bidirectional)


def _by_length(
    rows: Tensor, lengths: Tensor, first: Tensor, stride: int, longest: int, bidirectional: bool
) -> Sequences:
    """The longest sequence first, of sequences that begin at the rows `first` and have their steps `stride` apart."""
    ordered, order = lengths.sort(descending=True, stable=True)
    valid = valid_steps(longest, ordered)
    step = torch.arange(longest, device="cpu")[:, None]
    source = (first[order] + step * stride)[valid].to(rows.device, non_blocking=True)
    flip = _flip(valid, ordered).to(rows.device, non_blocking=True) if bidirectional else None
    order = order.to(rows.device, non_blocking=True)
    layout = Layout(longest, len(lengths), valid.sum(1), flip)
    return Sequences(take_rows(rows, source), layout, order, source)


def jagged(x: Tensor, bidirectional: bool) -> Sequences:
    """The rows of a jagged tensor (B, L, I); dense where all sequences have one length."""
    rows, offsets = ragged.rows_and_offsets(x)
    if not may_look(rows, offsets):
        raise ValueError(
            "a jagged tensor cannot go into a recurrent layer here, where its lengths are not known (torch.compile, "
            "torch.export, transforms of torch.func, torch.jit.trace): give x.to_padded_tensor(0) with "
            "lengths=x.offsets().diff()"
        )
    first = offsets.cpu()
    lengths = first.diff()
    batch = len(lengths)
    longest = int(lengths.max()) if batch else 0
    if batch and longest and int(lengths.min()) == longest:
        return Sequences(rows.unflatten(0, (batch, longest)).transpose(0, 1), Layout(longest, batch), jagged=x)
    return _by_length(rows, lengths, first[:-1], 1, longest, bidirectional)._replace(jagged=x)


def packed(given: PackedSequence, bidirectional: bool) -> Sequences:
    """A PackedSequence's own rows; dense where all sequences have one length."""
    x, batch_sizes = given.data, given.batch_sizes.contiguous()
    if not may_look(x, batch_sizes):
        unpacked, lengths = pad_packed_sequence(given)
        (steps, batch), on_device = unpacked.shape[:2], lengths.to(x.device)
        layout = Layout(steps, batch, lengths=on_device, visible=False, lengths_on_cpu=lengths)
        return Sequences(unpacked, layout, packed=given)
    steps, batch = len(batch_sizes), int(batch_sizes[0])
    if int(batch_sizes[-1]) == batch:
        return Sequences(x.unflatten(0, (steps, batch)), Layout(steps, batch), given.sorted_indices, packed=given)
    flip = None
    if bidirectional:
        valid = torch.arange(batch, device="cpu") < batch_sizes[:, None]
        flip = _flip(valid, valid.sum(0)).to(x.device, non_blocking=True)
    return Sequences(x, Layout(steps, batch, batch_sizes, flip), given.sorted_indices, packed=given)


def may_look(x: Tensor, lengths: Tensor | None) -> bool:
    """Whether the values of `lengths` may decide how the call goes, of tensors that are nothing but tensors."""
    if not have_values(x) or not values_visible(lengths) or is_traced_or_transformed():
        return False
    return type(x) in (Tensor, torch.nn.Parameter)


def _flip(valid: Tensor, lengths: Tensor) -> Tensor:
    """For each packed row the one that replaces it when each sequence is reversed."""
    number = (valid.flatten().cumsum(0) - 1).view_as(valid)  # of each row among the packed ones
    step = torch.arange(len(valid), device="cpu")[:, None]
    return number.gather(0, (lengths - 1 - step).clamp(min=0))[valid]


def resets(sequences: Sequences, reset: Tensor, bidirectional: bool) -> tuple[Tensor, Tensor | None]:
    """Flags (T, B) between steps t-1 and t, in the samples' given order, as flags of rows: for the forward and the
    backward direction True where the state is zeroed before that row is computed."""
    layout = sequences.layout
    order, backward = sequences.order, None
    if layout.lengths is not None:
        if bidirectional:
            # The boundary between t and t+1 is crossed backwards before t, if both are there.
            steps = torch.arange(1, layout.steps + 1, device=reset.device)[:, None]
            backward = torch.cat([reset[1:], torch.zeros_like(reset[:1])]) & (steps < layout.lengths)
        return reset, backward
    reset = reset[: layout.steps] if order is None else reset[: layout.steps].index_select(1, order)
    if layout.batch_sizes is None:
        after = torch.cat([reset[1:], torch.zeros_like(reset[:1])]) if bidirectional else None
        # A copy, since the caller may overwrite a buffer of flags before the backward.
        return (reset if order is not None else reset.clone()), after
    valid = torch.arange(layout.batch, device="cpu") < layout.batch_sizes[:, None]
    # Found on the CPU, where batch_sizes are, and sent: to find it on a GPU is to wait for it.
    places = valid.flatten().nonzero().squeeze(1).to(reset.device, non_blocking=True)
    if bidirectional:
        boundary = reset & valid.to(reset.device, non_blocking=True)
        backward = torch.cat([boundary[1:], torch.zeros_like(reset[:1])]).flatten().index_select(0, places)
    return reset.flatten().index_select(0, places), backward


def sort(state: Tensor, order: Tensor) -> Tensor:
    """(L * D, B, H) in the order of the rows."""
    return state.index_select(1, order)


def restore(state: Tensor, order: Tensor) -> Tensor:
    """(L * D, B, H) in the given order of the samples."""
    return torch.empty_like(state).index_copy_(1, order, state)


def output(rows: Tensor, sequences: Sequences, shape: Sequence[int], batch_first: bool) -> Tensor | PackedSequence:
    """The layers' output rows in the form of the input, whose `shape` a tensor had."""
    layout, given = sequences.layout, sequences.packed
    if given is not None:
        if layout.lengths is not None:
            return _pack_like(rows, layout.lengths, given)
        return given._replace(data=rows if layout.batch_sizes is not None else rows.flatten(0, 1))
    if sequences.jagged is not None:
        source = sequences.source
        rows = rows.transpose(0, 1).flatten(0, 1) if source is None else put_rows(rows, source, len(rows))
        return ragged.like(rows, sequences.jagged)
    if sequences.source is not None:
        return put_rows(rows, sequences.source, shape[0] * shape[1]).view(shape[0], shape[1], -1)
    steps = shape[1] if batch_first else shape[0]
    if layout.steps != steps:
        rows = torch.nn.functional.pad(rows, (0, 0, 0, 0, 0, steps - layout.steps))
    return rows.transpose(0, 1) if batch_first else rows


def _pack_like(padded: Tensor, lengths: Tensor, given: PackedSequence) -> PackedSequence:
    """Packed as the input was, with its very order of sequences."""
    if given.sorted_indices is not None:
        padded, lengths = padded[:, given.sorted_indices], lengths[given.sorted_indices]
    return given._replace(data=pack_padded_sequence(padded, lengths.cpu(), enforce_sorted=True).data)
