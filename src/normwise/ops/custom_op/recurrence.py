"""`torch.ops.normwise.recurrence`: a recurrent layer in one direction, whole sequences by kernels that autograd does
not see. Its second derivative is left out: torch.compile asks for none.

The node states which backend computes it, as `resolve` chose while the call was traced. What it keeps for its backward
is of the shapes that this backend declares, so that a compiler can plan with them where the kernels cannot run.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from normwise.backends.protocol import LayerRequest, LayerResult, Layout, Saved
from normwise.backends.recurrence import Recurrence, Weights
from normwise.ops._torch_internals import without_fake_tensors
from normwise.ops.autograd import DIFFERENTIABLE
from normwise.ops.custom_op.backends import required
from normwise.ops.dispatch import BACKENDS
from normwise.ops.rnn import packed
from normwise.ops.rnn.packed import Sequences

# Most tensors that a kernel keeps for its backward.
_MOST_SAVED = 6


def recurrence(backend: str, request: LayerRequest, returns_copy: bool) -> LayerResult:
    """A recurrent layer in one direction, dense or padded, by a `backend` as one node; `returns_copy` as in
    `stack.layer`."""
    config, x, h0, c0, weights, layout, reverse, reset, *_ = request
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, h0, c0, *weights))
    # Where they are known without a wait for a device.
    lengths = layout.lengths if layout.lengths_on_cpu is None else layout.lengths_on_cpu
    flattened = (
        config.cell,
        config.norm,
        config.norm_placement,
        list(config.groups),
        config.cell_norm,
        config.eps,
        config.reset_after,
        config.update_gate,
        config.update_offset,
        config.nonlinearity,
    )
    found = torch.ops.normwise.recurrence(x, h0, c0, *weights, lengths, reset, reverse, *flattened, backend, save)
    output = found[0].clone() if save and returns_copy else found[0]
    return LayerResult(output, found[1], None if c0 is None else found[2], {})


_TENSORS = "Tensor x, Tensor h0, Tensor? c0, " + ", ".join(f"Tensor? {name}" for name in Weights._fields)
_CALL = (
    "Tensor? lengths, Tensor? reset, bool reverse, str cell, str? norm, str norm_placement, int[] groups, "
    "str? cell_norm, float eps, bool reset_after, str update_gate, float update_offset, str nonlinearity, str backend"
)

# Outputs: output, h, c and what the backend keeps for the backward; empty where there is none, and where it is the
# output itself.
torch.library.define(
    "normwise::recurrence", f"({_TENSORS}, {_CALL}, bool save) -> ({', '.join(['Tensor'] * (3 + _MOST_SAVED))})"
)
# `kept`: the forward's output and what followed c. Returns the gradients of all tensors, empty where there is none.
torch.library.define(
    "normwise::recurrence_backward",
    f"(Tensor? doutput, Tensor? dh, Tensor? dc, {_TENSORS}, {_CALL}, Tensor[] kept, bool[] needs) -> Tensor[]",
)


def _saves(described: Sequence[Any], inputs: int, units: int, dtype: torch.dtype) -> tuple[Saved, ...]:
    """What the backend declares. A library may be asked, which knows nothing of fake tensors."""
    *config, backend = described
    saves = BACKENDS[backend].recurrence.kernels["layer"].saves
    with without_fake_tensors():
        return saves(_config(config), int(inputs), int(units), dtype)  # type: ignore[no-any-return]


class _Node(NamedTuple):
    """A call of the node as a request of the kernel, and the padded batch that it was."""

    request: LayerRequest
    sequences: Sequences

    def take(self, padded: Tensor | None) -> Tensor | None:
        """(T, B, ...) as the kernel's rows."""
        if padded is None:
            return None
        source, layout = self.sequences.source, self.sequences.layout
        return padded[: layout.steps] if source is None else padded.flatten(0, 1).index_select(0, source)

    def take_in_order(self, padded: Tensor) -> Tensor | None:
        """`take`, in the order of processing."""
        rows, flip = self.take(padded), self.sequences.layout.flip
        turned = self.request.reverse and flip is not None and rows is not None
        return rows.index_select(0, flip) if turned else rows  # type: ignore[union-attr,arg-type]

    def put(self, rows: Tensor, like: Tensor) -> Tensor:
        """The kernel's rows as (T, B, ...), 0 at padding."""
        padded = packed.output(rows, self.sequences, like.shape, batch_first=False)
        assert isinstance(padded, Tensor)
        return padded

    def sort(self, state: Tensor | None) -> Tensor | None:
        order = self.sequences.order
        return state if state is None or order is None else state.index_select(0, order)

    def restore(self, state: Tensor | None) -> Tensor | None:
        order = self.sequences.order
        return state if state is None or order is None else torch.empty_like(state).index_copy_(0, order, state)


def _node(arguments: tuple[Any, ...]) -> _Node:
    """From the tensors and the arguments that `_CALL` names."""
    x, h0, c0, *weights = arguments[:DIFFERENTIABLE]
    lengths, reset, reverse, *flattened, _ = arguments[DIFFERENTIABLE:]
    if lengths is None:
        sequences = Sequences(x, Layout(*x.shape[:2]))
    else:
        sequences = packed.pack(x.detach(), lengths, batch_first=False, bidirectional=reverse)
    request = LayerRequest(_config(flattened), sequences.x, h0, c0, Weights(*weights), sequences.layout, reverse)
    node = _Node(request, sequences)
    request = request._replace(h0=node.sort(h0), c0=node.sort(c0), reset=node.take(reset))  # type: ignore[arg-type]
    return node._replace(request=request)


def _config(flattened: Sequence[Any]) -> Recurrence:
    cell, norm, placement, groups, cell_norm, eps, reset_after, update_gate, update_offset, nonlinearity = flattened
    return Recurrence(
        cell,
        norm,
        placement,
        tuple(groups),
        cell_norm=cell_norm,
        eps=eps,
        reset_after=reset_after,
        update_gate=update_gate,
        update_offset=update_offset,
        nonlinearity=nonlinearity,
    )


@torch.library.impl("normwise::recurrence", ("cpu", "cuda"))
def _run(*arguments: Any) -> tuple[Tensor, ...]:
    *called, save = arguments
    x, h0, *_ = called
    node = _node(tuple(called))
    output, h, c, _, saved = required(called[-1]).recurrence.kernels["layer"].forward(node.request, save)
    declared = _saves(called[DIFFERENTIABLE + 3 :], x.shape[2], h0.shape[1], x.dtype) if save else ()
    every_row, kept = len(x) * len(h0), []
    for t, of in zip(saved, declared, strict=True):
        alone = t is not None and of.columns > 0 and not of.is_output
        kept.append(_with_rows(t.flatten(0, -2), every_row) if alone else None)
    kept += [None] * (_MOST_SAVED - len(kept))
    final_h, final_c = node.restore(h), node.restore(c)
    found = [node.put(output, x), final_h, final_c, *kept]
    return tuple(x.new_empty(0) if t is None else t for t in found)


def _with_rows(t: Tensor, rows: int) -> Tensor:
    """Of one size whatever the lengths are: what a compiler plans with does not depend on values."""
    return t if len(t) == rows else F.pad(t, (0, 0, 0, rows - len(t)))


def _fake(*arguments: Any) -> tuple[Tensor, ...]:
    tensors, (*described, save) = arguments[:DIFFERENTIABLE], arguments[DIFFERENTIABLE:]
    x, h0, c0, *_ = tensors
    rows, units = x.shape[0] * x.shape[1], h0.shape[1]
    declared = _saves(described[3:], x.shape[2], units, x.dtype) if save else ()
    kept = [
        x.new_empty((rows, of.columns), dtype=of.dtype) if of.columns and not of.is_output else x.new_empty(0)
        for of in declared
    ]
    kept += [x.new_empty(0) for _ in range(_MOST_SAVED - len(kept))]
    output = x.new_empty(*x.shape[:2], units)
    return output, x.new_empty(h0.shape), x.new_empty(0 if c0 is None else c0.shape), *kept


torch.library.register_fake("normwise::recurrence", _fake)  # handed over, see custom_op/norm.py


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, described = inputs[:DIFFERENTIABLE], inputs[DIFFERENTIABLE:-1]
    lengths, reset, *ctx.described = described
    ctx.save_for_backward(*tensors, lengths, reset, output[0], *output[3:])
    ctx.mark_non_differentiable(*output[3:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    everything = ctx.saved_tensors  # once: each look at it unpacks all, and checkpointing allows one
    tensors, (lengths, reset, *kept) = everything[:DIFFERENTIABLE], everything[DIFFERENTIABLE:]
    needs = list(ctx.needs_input_grad[:DIFFERENTIABLE])
    dc = grads[2] if tensors[2] is not None else None
    found = torch.ops.normwise.recurrence_backward(
        grads[0], grads[1], dc, *tensors, lengths, reset, *ctx.described, kept, needs
    )
    gradients = [g if needed else None for g, needed in zip(found, needs, strict=True)]
    return *gradients, *(None,) * (len(ctx.needs_input_grad) - DIFFERENTIABLE)


torch.library.register_autograd("normwise::recurrence", _differentiate, setup_context=_setup)


@torch.library.impl("normwise::recurrence_backward", ("cpu", "cuda"))
def _run_backward(*arguments: Any) -> list[Tensor]:
    grads, tensors, (*described, kept, needs) = _split(arguments)
    node = _node((*tensors, *described))
    output, *others = kept
    x, given = node.request.x, tensors[0]
    assert given is not None
    rows = x.shape[:-1].numel()
    declared = _saves(described[3:], given.shape[2], output.shape[2], given.dtype)
    saved = [
        node.take_in_order(output) if of.is_output else t[:rows] if of.columns else None
        for of, t in zip(declared, others[: len(declared)], strict=True)
    ]
    doutput, dh, dc = grads
    upstream = node.take(doutput), node.sort(dh), node.sort(dc)
    backward = required(described[-1]).recurrence.kernels["layer"].backward
    dx, dh0, dc0, *weights = backward(node.request, saved, upstream, needs)
    dx = None if dx is None else node.put(dx, given)
    found = [dx, node.restore(dh0), node.restore(dc0), *weights]
    return _apart([x.new_empty(0) if g is None else g for g in found])


def _apart(tensors: list[Tensor]) -> list[Tensor]:
    """Each with memory of its own, as a compiler takes an op's outputs to have: the gradients of two biases that are
    added up may be one tensor."""
    seen, found = set(), []
    for t in tensors:
        address = t.untyped_storage().data_ptr()
        found.append(t.clone() if address and address in seen else t)
        seen.add(address)
    return found


def _fake_backward(*arguments: Any) -> list[Tensor]:
    _, tensors, (*_, needs) = _split(arguments)
    first = 3  # x, h0 and c0
    wanted = [needs[0], True, True, *[any(needs[first:])] * (len(tensors) - first)]
    x = tensors[0]
    assert x is not None
    return [
        torch.empty_like(t, memory_format=torch.contiguous_format) if t is not None and want else x.new_empty(0)
        for t, want in zip(tensors, wanted, strict=True)
    ]


torch.library.register_fake("normwise::recurrence_backward", _fake_backward)


def _split(arguments: tuple[Any, ...]) -> tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...], tuple[Any, ...]]:
    """(gradients from above, tensors, the rest)."""
    return arguments[:3], arguments[3 : 3 + DIFFERENTIABLE], arguments[3 + DIFFERENTIABLE :]
