"""The registered op of a recurrent layer: while compiling or exporting, whole sequences are one node.

The node runs the compiled CPU kernels. Its backward is one node too, which has no derivative of its own: torch.compile
asks for none.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from normwise.kernels import cpu
from normwise.kernels import recurrent as kernels
from normwise.ops import recurrent_cpu
from normwise.ops.choose import forced
from normwise.ops.recurrent_cpu import DIFFERENTIABLE, Call, Kept, Tensors
from normwise.reference.recurrence import Recurrence, Weights
from normwise.reference.recurrent import Result


def fits(x: Tensor, weights: Weights, how: Recurrence, zoned: Tensor | None) -> bool:
    """Whether a call becomes the node: while compiling, on the CPU, where the kernels know the cell and the dtypes.

    Not in an export to ONNX, which has no such node: there the steps stand one by one.
    """
    return (
        torch.compiler.is_compiling()
        and not torch.onnx.is_in_onnx_export()
        and forced() in (None, "cpu")
        and x.device.type == "cpu"
        and recurrent_cpu.known_dtypes(x, weights)
        and recurrent_cpu.unsupported(weights, how, zoned) is None
        and _available()
    )


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
    """As `reference.recurrent.recurrence`, where it `fits`; `writable` as in `recurrent_cpu.recurrence`."""
    h0 = h0.to(x.dtype)
    c0 = None if c0 is None else c0.to(x.dtype)
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, h0, c0, *weights))
    described = (
        how.cell,
        how.norm,
        how.terms,
        list(how.groups),
        how.cell_norm,
        how.eps,
        how.reset_gate,
        how.update_gate,
        how.update_offset,
        how.nonlinearity,
    )
    found = torch.ops.normwise.recurrence(x, h0, c0, *weights, lengths, reset, reverse, *described, save)
    output = found[0].clone() if save and writable and how.cell != "lstm" else found[0]
    return Result(output, found[1], None if c0 is None else found[2], {})


def _available() -> bool:
    return cpu.available()


# What torch.compiler.assume_constant_result does; calling that here would load the compiler, which costs a second.
_available._dynamo_marked_constant = True  # type: ignore[attr-defined]

_TENSORS = "Tensor x, Tensor h0, Tensor? c0, " + ", ".join(f"Tensor? {name}" for name in Weights._fields)
_CALL = (
    "Tensor? lengths, Tensor? reset, bool reverse, str cell, str? norm, str terms, int[] groups, str? cell_norm, "
    "float eps, str reset_gate, str update_gate, float update_offset, str nonlinearity"
)
_KEPT = len(kernels.Saved._fields)

# Outputs: output, h, c and what the kernel keeps for the backward; empty where there is none.
torch.library.define(
    "normwise::recurrence", f"({_TENSORS}, {_CALL}, bool save) -> ({', '.join(['Tensor'] * (3 + _KEPT))})"
)
# `kept`: the forward's output and what followed c. Returns the gradients of all tensors, empty where there is none.
torch.library.define(
    "normwise::recurrence_backward",
    f"(Tensor? doutput, Tensor? dh, Tensor? dc, {_TENSORS}, {_CALL}, Tensor[] kept, bool[] needs) -> Tensor[]",
)


def _call_of(arguments: tuple[Any, ...]) -> Call:
    """From the arguments that `_CALL` names."""
    lengths, reset, reverse, cell, norm, terms, groups, cell_norm, eps, reset_gate, update_gate, offset, act = arguments
    how = Recurrence(
        cell,
        norm,
        terms,
        tuple(groups),
        cell_norm=cell_norm,
        eps=eps,
        reset_gate=reset_gate,
        update_gate=update_gate,
        update_offset=offset,
        nonlinearity=act,
    )
    return Call(how, lengths, reset, reverse)


@torch.library.impl("normwise::recurrence", "CPU")
def _run(*arguments: Any) -> tuple[Tensor, ...]:
    tensors, (*described, save) = arguments[:DIFFERENTIABLE], arguments[DIFFERENTIABLE:]
    x, h0, *_ = tensors
    output, h, c, kept = recurrent_cpu.forward(_call_of(tuple(described)), tensors, save=save)
    every_row = len(x) * len(h0)
    saved = [x.new_empty(0, dtype=torch.float32) if t is None else _with_rows(t, every_row) for t in kept.saved]
    return output, h, x.new_empty(0) if c is None else c, *saved


def _with_rows(t: Tensor, rows: int) -> Tensor:
    """Of one size whatever the lengths are: what a compiler plans with does not depend on values."""
    return F.pad(t, (0, 0, 0, rows - len(t)))


@torch.library.register_fake("normwise::recurrence")
def _(*arguments: Any) -> tuple[Tensor, ...]:
    tensors, (*described, save) = arguments[:DIFFERENTIABLE], arguments[DIFFERENTIABLE:]
    x, h0, c0, *_ = tensors
    rows, units = x.shape[0] * x.shape[1], h0.shape[1]
    widths = _widths(_call_of(tuple(described)), x.shape[2], units, x.dtype) if save else (0,) * _KEPT
    saved = [x.new_empty((rows, width) if width else 0, dtype=torch.float32) for width in widths]
    output = x.new_empty(*x.shape[:2], units)
    return output, torch.empty_like(h0), x.new_empty(0) if c0 is None else torch.empty_like(c0), *saved


def _widths(call: Call, inputs: int, units: int, dtype: torch.dtype) -> tuple[int, ...]:
    """Columns of what the kernel keeps: the library says, and it knows nothing of fake tensors."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with unset_fake_temporarily():
        return kernels.saved_widths(recurrent_cpu.kernel_layer(call.how), int(inputs), int(units), dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, described = inputs[:DIFFERENTIABLE], inputs[DIFFERENTIABLE:-1]
    lengths, reset, *ctx.how = described
    ctx.save_for_backward(*tensors, lengths, reset, output[0], *output[3:])
    ctx.mark_non_differentiable(*output[3:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    everything = ctx.saved_tensors  # once: each look at it unpacks all, and checkpointing allows one
    tensors, (lengths, reset, *kept) = everything[:DIFFERENTIABLE], everything[DIFFERENTIABLE:]
    needs = list(ctx.needs_input_grad[:DIFFERENTIABLE])
    dc = grads[2] if tensors[2] is not None else None
    found = torch.ops.normwise.recurrence_backward(
        grads[0], grads[1], dc, *tensors, lengths, reset, *ctx.how, kept, needs
    )
    gradients = [g if needed else None for g, needed in zip(found, needs, strict=True)]
    return *gradients, *(None,) * (len(ctx.needs_input_grad) - DIFFERENTIABLE)


torch.library.register_autograd("normwise::recurrence", _differentiate, setup_context=_setup)


@torch.library.impl("normwise::recurrence_backward", "CPU")
def _run_backward(*arguments: Any) -> list[Tensor]:
    grads, tensors, (*described, kept, needs) = _split(arguments)
    call, x = _call_of(tuple(described)), tensors[0]
    assert x is not None
    rows = recurrent_cpu.rows_of(call, x)
    count = None if rows.source is None else len(rows.source)
    saved = kernels.Saved(*(t[:count] if t.dim() == 2 else None for t in kept[1:]))
    found = recurrent_cpu.backward(call, tensors, Kept(rows.take(kept[0]), saved), grads, tuple(needs))
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


def _split(arguments: tuple[Any, ...]) -> tuple[tuple[Tensor | None, ...], Tensors, tuple[Any, ...]]:
    """(gradients from above, tensors, the rest)."""
    return arguments[:3], arguments[3 : 3 + DIFFERENTIABLE], arguments[3 + DIFFERENTIABLE :]
