"""A recurrent layer by the compiled CPU kernels: one call forward, one call backward, and the gradient's wiring."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normwise.kernels import recurrent as kernels
from normwise.kernels.arguments import unreadable
from normwise.kernels.library import load
from normwise.ops import recurrent_loop
from normwise.ops.choose import may_take
from normwise.reference.recurrence import Recurrence, Weights
from normwise.reference.recurrent import Result
from normwise.reference.sequences import reverse_reset, valid_steps


def obstacle(x: Tensor, weights: Weights, how: Recurrence, zoned: Tensor | None, *others: Tensor | None) -> str | None:
    """What keeps the kernels from this recurrence, or None. `others`: what else they read, such as states."""
    if torch.compiler.is_compiling():
        return "while compiling, ATen's operations are left to the compiler"
    if (unknown := unsupported(weights, how, zoned)) is not None:
        return unknown
    if not _built():
        return "the compiled library was built before it had recurrent kernels: reinstall normwise"
    given = [w for w in weights if w is not None]
    if not known_dtypes(x, weights):
        dtypes = sorted({str(t.dtype) for t in (x, *given)})
        return f"the recurrent C++ kernels take float32 or bfloat16, not {', '.join(dtypes)}"
    return unreadable(*weights, *others)


def unsupported(weights: Weights, how: Recurrence, zoned: Tensor | None) -> str | None:
    """What the kernels have not, of whatever kind the tensors are; None if they have all of it."""
    if 0 in (weights.weight_ih.shape[-1], weights.weight_hh.shape[-1]):
        return "the C++ kernels have at least one input and one unit"
    if how.norm == "batch":
        return "the C++ kernels take no batch statistics inside a recurrence"
    if how.norm is not None and how.terms == "input":
        return "the C++ kernels take no norm on the input term alone"
    if weights.weight_hr is not None:
        return "the C++ kernels take no projection"
    if how.zoneout or zoned is not None:
        return "the C++ kernels take no zoneout"
    return None


def known_dtypes(x: Tensor, weights: Weights) -> bool:
    """All float32; or bfloat16, where gains and biases may be float32, as under autocast."""
    dtype = x.dtype
    if dtype not in (torch.float32, torch.bfloat16) or not weights.weight_ih.dtype == weights.weight_hh.dtype == dtype:
        return False
    return {w.dtype for w in weights if w is not None} <= {dtype, torch.float32}


@cache
def _built() -> bool:
    """A library built from older sources lacks these kernels; one that is missing is `choose`'s to report."""
    library = load().library
    return library is None or hasattr(library, "nw_recurrent_forward")


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
    writable: bool = False,
) -> Result:
    """As `reference.recurrent.recurrence`, where `obstacle` finds none. Its second derivative is the loop's.

    The backward reads the output: changed in place before, it raises torch's error. `writable` lets the backward have a
    copy where torch's own layer would not mind: a GRU's and an RNN's output is a copy of its states, an LSTM's is not.
    """
    h0 = h0.to(x.dtype)
    c0 = None if c0 is None else c0.to(x.dtype)
    call = Call(how, lengths, reset, reverse)
    tensors = (x, h0, c0, *weights)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        output, h, c = _Compiled.apply(call, writable and how.cell != "lstm", *tensors)
    else:
        output, h, c, _ = forward(call, tensors, save=False)
    return Result(output, h, c, {})


class Call(NamedTuple):
    """What one call does besides its differentiable tensors."""

    how: Recurrence
    lengths: Tensor | None
    reset: Tensor | None
    reverse: bool


class Rows(NamedTuple):
    """Where the kernel's rows lie in a padded (T, B, ...), and the order of its samples; None: just as they are."""

    steps: kernels.Steps
    source: Tensor | None = None
    order: Tensor | None = None

    def take(self, padded: Tensor | None) -> Tensor | None:
        """(T, B, features) -> (rows, features); as it is where rows lie as in it."""
        if padded is None or self.source is None:
            return padded
        return padded.flatten(0, 1).index_select(0, self.source)

    def put(self, rows: Tensor, like: Tensor) -> Tensor:
        """(rows, features) -> (T, B, features), 0 at padding; no view of another tensor."""
        if self.source is None:
            return rows
        padded = rows.new_zeros(*like.shape[:2], rows.shape[-1])
        padded.flatten(0, 1).index_copy_(0, self.source, rows)
        return padded

    def sort(self, state: Tensor | None) -> Tensor | None:
        """(B, units) in the kernel's order."""
        return state if state is None or self.order is None else state.index_select(0, self.order)

    def restore(self, state: Tensor | None) -> Tensor | None:
        """(B, units) in the caller's order."""
        if state is None or self.order is None:
            return state
        return torch.empty_like(state).index_copy_(0, self.order, state)


def rows_of(call: Call, x: Tensor) -> Rows:
    steps, batch = x.shape[:2]
    lengths, reset = call.lengths, call.reset
    if lengths is None:
        if reset is not None:
            # The kernel wants the flag where it computes: backwards, one step before the boundary.
            reset = (reverse_reset(reset, None).flip(0) if call.reverse else reset).reshape(-1)
        return Rows(kernels.Steps(steps, batch, None, reset, call.reverse))
    # As in a PackedSequence: longest first, and no row for padding; backwards, each sequence from its own end.
    ordered, order = lengths.sort(descending=True, stable=True)
    valid = valid_steps(steps, ordered)
    sizes = valid.sum(1)
    at = torch.arange(steps, device=x.device)[:, None].expand(steps, batch)
    source = ((ordered - 1 - at if call.reverse else at) * batch + order)[valid]
    if reset is not None:
        flags = reverse_reset(reset, lengths) if call.reverse else reset
        reset = flags[:, order][valid]
    return Rows(kernels.Steps(int((sizes > 0).sum()), batch, sizes[sizes > 0], reset), source, order)


@cache
def kernel_layer(how: Recurrence) -> kernels.Layer:
    """The recurrence in the words of the kernels."""
    return kernels.Layer(
        cell=f"rnn_{how.nonlinearity}" if how.cell == "rnn" else how.cell,
        terms="plain" if how.norm is None else how.terms,
        center=how.norm == "layer",
        cell_norm=how.cell_norm,
        groups=how.groups,
        eps=how.eps,
        reset_candidate=how.reset_gate == "candidate",
        update_paper=how.update_gate == "paper",
        update_offset=how.update_offset,
    )


def kernel_weights(weights: Weights) -> kernels.Weights:
    """A norm over the sum has its gain where the kernel keeps the hidden term's."""
    w = weights
    gain = w.gain_hh if w.gain_sum is None else w.gain_sum
    return kernels.Weights(
        w.weight_ih, w.weight_hh, w.bias_ih, w.bias_hh, w.gain_ih, gain, w.bias_inner, w.gain_c, w.bias_c
    )


Tensors = tuple[Tensor | None, ...]  # x, h0, c0 and the fields of Weights
DIFFERENTIABLE = 3 + len(Weights._fields)


class Kept(NamedTuple):
    """What the backward needs beside the inputs."""

    output: Tensor | None  # row by row, as returned; None where `saved` has it
    saved: kernels.Saved


def forward(call: Call, tensors: Tensors, *, save: bool) -> tuple[Tensor, Tensor, Tensor | None, Kept]:
    """(output, h, c, what the backward needs)."""
    x, h0, c0, *rest = tensors
    assert x is not None
    assert h0 is not None
    rows = rows_of(call, x)
    taken = rows.take(x), rows.sort(h0), rows.sort(c0)
    weights = kernel_weights(Weights(*rest))  # type: ignore[arg-type]
    result = kernels.forward(kernel_layer(call.how), weights, *taken, rows.steps, save=save)  # type: ignore[arg-type]
    h, c = rows.restore(result.h), rows.restore(result.c)
    assert h is not None
    kept = Kept(result.output if result.saved.output is None else None, result.saved)
    return rows.put(result.output, x), h, c, kept


class _Compiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Call, writable: bool, *tensors: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        # Small beside what else is kept, and buffers that a caller may fill anew before the backward.
        call = call._replace(lengths=_copy(call.lengths), reset=_copy(call.reset))
        output, h, c, kept = forward(call, tensors, save=True)
        if writable and kept.output is output:
            output = output.clone()
        ctx.save_for_backward(*tensors, call.lengths, call.reset, kept.output, *kept.saved)
        ctx.how, ctx.reverse = call.how, call.reverse
        return output, h, c

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        everything = ctx.saved_tensors  # once: each look at it unpacks all, and checkpointing allows one
        tensors, (lengths, reset, output, *saved) = everything[:DIFFERENTIABLE], everything[DIFFERENTIABLE:]
        call, needs = Call(ctx.how, lengths, reset, ctx.reverse), ctx.needs_input_grad[2:]
        if all(g is None or may_take(g) for g in grads):
            return None, None, *backward(call, tensors, Kept(output, kernels.Saved(*saved)), grads, needs)
        return None, None, *differentiable(call, tensors, needs, grads)


def _copy(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.clone()


def backward(
    call: Call, tensors: Tensors, kept: Kept, grads: tuple[Tensor | None, ...], needs: tuple[bool, ...]
) -> list[Tensor | None]:
    """Gradients of `tensors` from those of output, h and c."""
    x, h0, c0, *rest = tensors
    assert x is not None
    assert h0 is not None
    rows, (doutput, dh, dc) = rows_of(call, x), grads
    found = kernels.backward(
        kernel_layer(call.how),
        kernel_weights(Weights(*rest)),  # type: ignore[arg-type]
        rows.take(x),  # type: ignore[arg-type]
        rows.sort(h0),  # type: ignore[arg-type]
        rows.sort(c0),
        rows.steps,
        kept.output,
        kept.saved,
        rows.take(doutput),
        rows.sort(dh),
        rows.sort(dc),
        needs_x=needs[0],
        needs_weights=any(needs[3:]),
    )
    dx = None if found.x is None else rows.put(found.x, x)
    weights = _by_field(Weights(*rest), found.weights)  # type: ignore[arg-type]
    return [dx, rows.restore(found.h0), rows.restore(found.c0), *weights]


def _by_field(weights: Weights, found: kernels.Weights | None) -> list[Tensor | None]:
    """The kernel's gradients in the order of `Weights`, None where there is no parameter."""
    if found is None:
        return [None] * len(weights)
    gradients = dict(found._asdict())
    if weights.gain_sum is not None:
        gradients["gain_sum"] = gradients.pop("gain_hh")
    return [gradients.get(name) if w is not None else None for name, w in weights._asdict().items()]


def differentiable(
    call: Call, tensors: Tensors, needs: tuple[bool, ...], grads: tuple[Tensor | None, ...]
) -> list[Tensor | None]:
    """The same gradients by ATen's operations, by running the loop once more: for gradients of these gradients, for
    several gradients from above at once, and for forward-mode derivatives."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # A view of each, or a tensor that is given twice would get the sum of both gradients twice.
        tensors = tuple(t.view_as(t) if t is not None and n else t for t, n in zip(tensors, needs, strict=True))
        x, h0, c0, *rest = tensors
        assert x is not None
        assert h0 is not None
        again = recurrent_loop.recurrence(
            x,
            h0,
            c0,
            Weights(*rest),  # type: ignore[arg-type]
            call.how,
            lengths=call.lengths,
            reset=call.reset,
            reverse=call.reverse,
        )
        outputs = [(o, g) for o, g in zip(again[:3], grads, strict=True) if isinstance(o, Tensor) and g is not None]
        wanted = [n for n, (t, needed) in enumerate(zip(tensors, needs, strict=True)) if t is not None and needed]
        found = torch.autograd.grad(
            [o for o, _ in outputs],
            [t for n in wanted if (t := tensors[n]) is not None],
            [g for _, g in outputs],
            create_graph=create_graph,
            allow_unused=True,
        )
    gradients: list[Tensor | None] = [None] * len(tensors)
    for n, gradient in zip(wanted, found, strict=True):
        gradients[n] = gradient
    return gradients
