"""The nodes that torch.compile and torch.export see of a norm that ATen has no kernel for, and of a recurrent layer.

Eager calls go straight to the computation. While compiling or exporting, the same call is one node, whose backward is
one node too. The second derivative of `torch.ops.normwise.norm` is the reference's; that of
`torch.ops.normwise.recurrence`, whole sequences by the C++ kernels, is left out: torch.compile asks for none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from normwise.backends import reference
from normwise.backends.cpu import rnn as cpu_rnn
from normwise.backends.protocol import LayerRequest, LayerResult, Layout
from normwise.backends.recurrence import Recurrence, Weights
from normwise.backends.reference import Moments, accumulation_dtype
from normwise.ops._torch_internals import register_decomposition, without_fake_tensors
from normwise.ops.autograd import DIFFERENTIABLE
from normwise.ops.rnn import packed
from normwise.ops.rnn.packed import Sequences


def norm(
    x: Tensor,
    dims: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    mask: Tensor | None = None,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    eps: float,
    center: bool = True,
) -> tuple[Tensor, Moments]:
    """`reference.norm` as one node of the compiler's graph. No gradient flows through the moments."""
    y, *used = _norm(x, list(dims), weight, bias, mask, mean, var, eps, center)
    return y, Moments(*used)


@torch.library.custom_op("normwise::norm", mutates_args=())
def _norm(
    x: Tensor,
    dims: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    center: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, moments = reference.norm(x, dims, weight, bias, mask=mask, mean=mean, var=var, eps=eps, center=center)
    # An op's outputs may be neither its inputs nor views of them.
    return y.clone() if y is x else y, moments.mean.clone(), moments.var.clone(), moments.count.clone()


@register_decomposition(torch.ops.normwise.norm.default)
def _(*args: Any) -> tuple[Tensor, ...]:
    """What takes the node's place in an export to a format that has no such node, as ONNX: a LayerNorm of moved axes
    where it is one, which such formats have, otherwise the formula."""
    x, dims, weight, bias, mask, mean, var, eps, center = args
    y, moments = reference.norm(x, dims, weight, bias, mask=mask, mean=mean, var=var, eps=eps, center=center)
    affine = [t for t in (weight, bias) if t is not None]
    by_feature = all(t.dtype == x.dtype and t.shape == _kept(x, dims) for t in affine)
    if center and mask is None and mean is None and by_feature:
        last = tuple(range(-len(dims), 0))
        moved = x.movedim(dims, last)
        shape = moved.shape[-len(dims) :]
        gain, shift = (None if t is None else t.movedim(dims, last).reshape(shape) for t in (weight, bias))
        y = torch.nn.functional.layer_norm(moved, shape, gain, shift, eps).movedim(last, dims)
    return y, *moments


def _kept(x: Tensor, dims: Sequence[int]) -> tuple[int, ...]:
    return tuple(size if d in dims else 1 for d, size in enumerate(x.shape))


@_norm.register_fake
def _(
    x: Tensor,
    dims: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    center: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = accumulation_dtype(x.dtype)
    if mean is not None and var is not None:
        return (
            torch.empty_like(x),
            torch.empty_like(mean, dtype=wide),
            torch.empty_like(var, dtype=wide),
            torch.empty_like(var, dtype=wide),
        )
    shape = [1 if d in dims else s for d, s in enumerate(x.shape)]
    counts = [1] * x.dim() if mask is None else [1 if d in dims else s for d, s in enumerate(mask.shape)]
    mean_shape = shape if center else counts
    return (
        torch.empty_like(x),
        x.new_empty(mean_shape, dtype=wide),
        x.new_empty(shape, dtype=wide),
        x.new_empty(counts, dtype=wide),
    )


@torch.library.custom_op("normwise::norm_backward", mutates_args=())
def _norm_backward(
    grad: Tensor,
    x: Tensor,
    dims: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    center: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grads = reference.norm_backward(grad, x, dims, weight, bias, mask=mask, mean=mean, var=var, eps=eps, center=center)
    # Cloned, because a gradient that needed no sum over broadcast axes can be a view of `grad`.
    dx, dweight, dbias = (x.new_empty(0) if g is None else g.clone() for g in grads)
    return dx, dweight, dbias


@_norm_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    dims: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    center: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(x),
        x.new_empty(0) if weight is None else torch.empty_like(weight),
        x.new_empty(0) if bias is None else torch.empty_like(bias),
    )


def _save_norm(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, dims, weight, bias, mask, mean, var, eps, center = inputs
    ctx.save_for_backward(x, weight, bias, mask, mean, var)
    ctx.settings = list(dims), eps, center


def _differentiate_norm(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Any, ...]:
    x, weight, bias, mask, mean, var = ctx.saved_tensors
    dims, eps, center = ctx.settings
    dx, dweight, dbias = _norm_backward(grad, x, dims, weight, bias, mask, mean, var, eps, center)
    return (
        dx,
        None,
        None if weight is None else dweight,
        None if bias is None else dbias,
        *(None,) * 5,
    )


_norm.register_autograd(_differentiate_norm, setup_context=_save_norm)


def _save_norm_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    grad, x, dims, weight, bias, mask, mean, var, eps, center = inputs
    ctx.save_for_backward(grad, x, weight, bias, mask, mean, var)
    ctx.settings = list(dims), eps, center


def _differentiate_norm_backward(ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
    """Second derivative: that of the reference's first one."""
    grad, x, weight, bias, mask, mean, var = ctx.saved_tensors
    dims, eps, center = ctx.settings
    with torch.enable_grad():
        grad, x = grad.detach().requires_grad_(), x.detach().requires_grad_()
        weight, bias = (None if t is None else t.detach().requires_grad_() for t in (weight, bias))
        leaves = (grad, x, weight, bias)
        first = reference.norm_backward(
            grad, x, dims, weight, bias, mask=mask, mean=mean, var=var, eps=eps, center=center
        )
        pairs = [(f, u) for f, u in zip(first, upstream, strict=True) if f is not None and u is not None]
        outputs, grads = zip(*pairs, strict=True)
        wanted = [t for t in leaves if t is not None]
        found = iter(torch.autograd.grad(outputs, wanted, grads, allow_unused=True))
    dgrad, dx, dweight, dbias = (None if t is None else next(found) for t in leaves)
    return dgrad, dx, None, dweight, dbias, *(None,) * 5


_norm_backward.register_autograd(_differentiate_norm_backward, setup_context=_save_norm_backward)


def recurrence(request: LayerRequest, returns_copy: bool) -> LayerResult:
    """A recurrent layer in one direction, dense or padded, as one node; `returns_copy` as in `stack.layer`."""
    config, x, h0, c0, weights, layout, reverse, reset, *_ = request
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, h0, c0, *weights))
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
    found = torch.ops.normwise.recurrence(x, h0, c0, *weights, layout.lengths, reset, reverse, *flattened, save)
    output = found[0].clone() if save and returns_copy else found[0]
    return LayerResult(output, found[1], None if c0 is None else found[2], {})


_TENSORS = "Tensor x, Tensor h0, Tensor? c0, " + ", ".join(f"Tensor? {name}" for name in Weights._fields)
_CALL = (
    "Tensor? lengths, Tensor? reset, bool reverse, str cell, str? norm, str norm_placement, int[] groups, "
    "str? cell_norm, float eps, bool reset_after, str update_gate, float update_offset, str nonlinearity"
)
_NUM_SAVED = len(cpu_rnn.SAVED)

# Outputs: output, h, c and what the kernel keeps for the backward, its float32 output last; empty where there is none.
torch.library.define(
    "normwise::recurrence", f"({_TENSORS}, {_CALL}, bool save) -> ({', '.join(['Tensor'] * (3 + _NUM_SAVED))})"
)
# `kept`: the forward's output and what followed c. Returns the gradients of all tensors, empty where there is none.
torch.library.define(
    "normwise::recurrence_backward",
    f"(Tensor? doutput, Tensor? dh, Tensor? dc, {_TENSORS}, {_CALL}, Tensor[] kept, bool[] needs) -> Tensor[]",
)


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
    lengths, reset, reverse, *flattened = arguments[DIFFERENTIABLE:]
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


@torch.library.impl("normwise::recurrence", "CPU")
def _run(*arguments: Any) -> tuple[Tensor, ...]:
    *called, save = arguments
    x, h0, *_ = called
    node = _node(tuple(called))
    output, h, c, _, saved = cpu_rnn.forward(node.request, save)
    every_row = len(x) * len(h0)
    kept: list[Tensor | None] = [None] * _NUM_SAVED
    if save:
        wide, *others = saved
        assert wide is not None
        kept = [*others, None if wide.dtype == x.dtype else wide.flatten(0, -2)]
    final_h, final_c = node.restore(h), node.restore(c)
    assert final_h is not None
    return (
        node.put(output, x),
        final_h,
        x.new_empty(0) if final_c is None else final_c,
        *[x.new_empty(0, dtype=torch.float32) if t is None else _with_rows(t, every_row) for t in kept],
    )


def _with_rows(t: Tensor, rows: int) -> Tensor:
    """Of one size whatever the lengths are: what a compiler plans with does not depend on values."""
    return F.pad(t, (0, 0, 0, rows - len(t)))


@torch.library.register_fake("normwise::recurrence")
def _(*arguments: Any) -> tuple[Tensor, ...]:
    tensors, (*described, save) = arguments[:DIFFERENTIABLE], arguments[DIFFERENTIABLE:]
    x, h0, c0, *_ = tensors
    rows, units = x.shape[0] * x.shape[1], h0.shape[1]
    widths = _widths(described[3:], x.shape[2], units, x.dtype) if save else (0,) * _NUM_SAVED
    saved = [x.new_empty((rows, width) if width else 0, dtype=torch.float32) for width in widths]
    output = x.new_empty(*x.shape[:2], units)
    return output, torch.empty_like(h0), x.new_empty(0) if c0 is None else torch.empty_like(c0), *saved


def _widths(flattened: Sequence[Any], inputs: int, units: int, dtype: torch.dtype) -> tuple[int, ...]:
    """Columns of what the kernel keeps: the library says, and it knows nothing of fake tensors."""
    with without_fake_tensors():
        return cpu_rnn.saved_widths(_config(flattened), int(inputs), int(units), dtype)


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


@torch.library.impl("normwise::recurrence_backward", "CPU")
def _run_backward(*arguments: Any) -> list[Tensor]:
    grads, tensors, (*described, kept, needs) = _split(arguments)
    node = _node((*tensors, *described))
    output, *others = kept
    layout, x = node.sequences.layout, node.request.x
    rows = x.shape[:-1].numel()
    *others, wide = (t[:rows] if t.dim() == 2 else None for t in others)
    if wide is None:
        wide = node.take(output)
        if node.request.reverse and layout.flip is not None and wide is not None:
            wide = wide.index_select(0, layout.flip)
    else:
        wide = wide.unflatten(0, x.shape[:-1])
    doutput, dh, dc = grads
    upstream = node.take(doutput), node.sort(dh), node.sort(dc)
    dx, dh0, dc0, *weights = cpu_rnn.backward(node.request, (wide, *others), upstream, needs)
    dx = None if dx is None else node.put(dx, tensors[0])  # type: ignore[arg-type]
    found = [dx, node.restore(dh0), node.restore(dc0), *weights]
    return [x.new_empty(0) if g is None else g for g in found]


@torch.library.register_fake("normwise::recurrence_backward")
def _(*arguments: Any) -> list[Tensor]:
    _, tensors, (*_, needs) = _split(arguments)
    first = 3  # x, h0 and c0
    wanted = [needs[0], True, True, *[any(needs[first:])] * (len(tensors) - first)]
    x = tensors[0]
    assert x is not None
    return [
        torch.empty_like(t, memory_format=torch.contiguous_format) if t is not None and want else x.new_empty(0)
        for t, want in zip(tensors, wanted, strict=True)
    ]


def _split(arguments: tuple[Any, ...]) -> tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...], tuple[Any, ...]]:
    """(gradients from above, tensors, the rest)."""
    return arguments[:3], arguments[3 : 3 + DIFFERENTIABLE], arguments[3 + DIFFERENTIABLE :]
