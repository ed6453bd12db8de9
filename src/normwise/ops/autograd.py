"""Gradients of what the compiled kernels compute: one autograd.Function a family of operations.

All that a backward needs goes through `save_for_backward`, so that version counters, checkpointing and saved-tensor
hooks see it. Second derivatives are the reference's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normwise.backends.protocol import (
    Gate,
    LayerKernel,
    LayerRequest,
    Layout,
    Moments,
    NormConfig,
    NormFamily,
    NormRequest,
    Running,
)
from normwise.backends.recurrence import Recurrence, Weights
from normwise.backends.reference import rnn as reference_rnn
from normwise.backends.reference.norms import backward as differentiable_backward
from normwise.backends.reference.norms import gated
from normwise.ops._torch_internals import is_plain_elsewhere, readable, readable_on_gpu
from normwise.ops.dispatch import is_traced_or_transformed


def requires_grad(request: NormRequest) -> bool:
    """Whether a gradient of the request may be asked for."""
    _, x, residual, weight, bias, *_ = request
    return (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    )


def supports_grad_output(*tensors: Tensor | None, on_gpu: bool = False) -> bool:
    """Whether a kernel's backward may take these: upstream gradients that nobody differentiates again, or in forward
    mode, and that are no batch of gradients (torch.func.vmap, is_grads_batched) nor another kind of tensor; and saved
    tensors, in whose place a hook may have put anything. `on_gpu`: where the forward was."""
    return (
        not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not is_traced_or_transformed()
        and (
            readable_on_gpu(*tensors)
            if on_gpu
            else readable(*tensors) or all(t is None or is_plain_elsewhere(t) for t in tensors)
        )
    )


class Norm(torch.autograd.Function):
    """A norm of any family by kernels that autograd does not see."""

    @staticmethod
    def forward(
        ctx: Any,
        family: NormFamily,
        request: NormRequest,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> Any:
        config, mask = request.config, request.mask
        y, total, stats, updated, moments, _ = family.forward(
            config, x, residual, weight, bias, mask, *request[6:], True
        )
        # Residual and bias are needed again only to know where the activation was flat.
        if config.act is None and mask is None:
            ctx.save_for_backward(total, weight, stats)
        elif config.act is None:
            ctx.save_for_backward(total, None, weight, None, mask, stats)
        else:
            added_after = None if config.family == "features" else residual
            ctx.save_for_backward(total, added_after, weight, bias, mask, stats)
        ctx.bias_like = None if bias is None else (bias.shape, bias.dtype)
        ctx.family, ctx.config, ctx.on_gpu = family, config, x.is_cuda
        ctx.set_materialize_grads(False)
        # As an output only where it is one, x + residual: an input returned as it is would become a view of itself.
        return y, total if residual is not None and config.family == "features" else None, None, updated, moments

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dtotal: Tensor | None = None, *_: Any) -> Any:
        saved = ctx.saved_tensors  # once: each look at it unpacks all, and checkpointing allows one
        residual = bias = mask = None
        if len(saved) == 3:
            total, weight, stats = saved
        else:
            total, residual, weight, bias, mask, stats = saved
        config = ctx.config
        if bias is None and ctx.bias_like is not None:  # its values do not matter, and making a tensor takes long
            shape, dtype = ctx.bias_like
            like_weight = weight is not None and weight.dtype is dtype and weight.shape == shape
            bias = weight if like_weight else total.new_empty(shape, dtype=dtype)
        if dy is None:
            dy = torch.zeros_like(total)
        compiled = supports_grad_output(dy, dtotal, *saved, on_gpu=ctx.on_gpu)
        backward = ctx.family.backward if compiled else differentiable_backward
        grads = backward(config, total, residual, weight, bias, mask, stats, dy, dtotal)
        dresidual = None
        if ctx.needs_input_grad[3]:
            dresidual = grads.residual
            if dresidual is None:  # no activation follows it
                dresidual = dy if mask is None else dy.masked_fill(~mask, 0)
        return None, None, grads.x, dresidual, grads.weight, grads.bias


class GatedNorm(torch.autograd.Function):
    """A norm of features with a gate, by kernels that autograd does not see: y, and x + residual where there is one."""

    @staticmethod
    def forward(
        ctx: Any,
        family: NormFamily,
        request: NormRequest,
        gate_act: str | None,
        gate_first: bool,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        values: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        config, mask = request.config, request.mask
        gate = Gate(values, gate_act, gate_first)
        y, total, stats, *_ = family.forward(config, x, residual, weight, bias, mask, None, None, None, True, gate)
        ctx.save_for_backward(total, weight, bias, mask, values, stats)
        ctx.family, ctx.config, ctx.gate_act, ctx.gate_first = family, config, gate_act, gate_first
        ctx.on_gpu = x.is_cuda
        ctx.set_materialize_grads(False)
        return y, None if residual is None else total

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dtotal: Tensor | None = None) -> Any:
        saved = ctx.saved_tensors  # once: each look at it unpacks all, and checkpointing allows one
        total, weight, bias, mask, values, stats = saved
        gate = Gate(values, ctx.gate_act, ctx.gate_first)
        if dy is None:
            dy = torch.zeros_like(total)
        if supports_grad_output(dy, dtotal, *saved, on_gpu=ctx.on_gpu):
            grads = ctx.family.backward(ctx.config, total, None, weight, bias, mask, stats, dy, dtotal, gate)
            dx, _, dweight, dbias, dvalues = grads
        else:
            dx, dweight, dbias, dvalues = _differentiable_gated_backward(
                ctx.config, (total, weight, bias, values), mask, gate, dy
            )
            if dtotal is not None:
                dx = dx + (dtotal if mask is None else dtotal.masked_fill(~mask, 0))
        return None, None, None, None, dx, dx if ctx.needs_input_grad[5] else None, dweight, dbias, dvalues


def _differentiable_gated_backward(
    config: NormConfig, tensors: tuple[Tensor | None, ...], mask: Tensor | None, gate: Gate, dy: Tensor
) -> list[Any]:
    """Gradients of x + residual, gain, bias and gate by the reference, which runs once more."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # A view of each, or a tensor that is given twice would get the sum of both gradients twice.
        views = [
            None if t is None else t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in tensors
        ]
        x, weight, bias, values = views
        y = gated(config, x, weight, bias, mask, gate._replace(values=values))  # type: ignore[arg-type]
        wanted = [t for t in views if t is not None]
        found = iter(torch.autograd.grad(y, wanted, dy, create_graph=create_graph))
    return [None if t is None else next(found) for t in views]


class RecurrentLayer(torch.autograd.Function):
    """A recurrent layer in one direction by kernels that autograd does not see.

    The backward reads the output: changed in place before, it raises torch's error. `returns_copy` gives the caller a
    copy, which may be changed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        kernel: LayerKernel,
        returns_copy: bool,
        config: Recurrence,
        layout: Layout,
        reverse: bool,
        reset: Tensor | None,
        running: Running | None,
        start_step: int,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None, dict[str, Moments]]:
        if running is not None:
            running = _rows_read(running, start_step, layout.steps)
        result = kernel.forward(_layer_request(config, layout, reverse, reset, running, tensors), True)
        output, saved = result.output, result.saved
        if returns_copy and saved[0] is output:
            output = output.clone()
        tables = () if running is None else [t for pair in running.values() for t in pair]
        ctx.save_for_backward(*tensors, layout.batch_sizes, layout.flip, reset, *tables, *saved)
        # Without its tensors, which are saved.
        ctx.sites = None if running is None else tuple(running)
        ctx.kernel, ctx.config, ctx.size, ctx.reverse = kernel, config, (layout.steps, layout.batch), reverse
        ctx.set_materialize_grads(False)
        return output, result.h, result.c, result.statistics

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        everything = ctx.saved_tensors  # once: each look at it unpacks all, and checkpointing allows one
        tensors, (batch_sizes, flip, reset, *saved) = everything[:DIFFERENTIABLE], everything[DIFFERENTIABLE:]
        steps, batch = ctx.size
        layout = Layout(steps, batch, batch_sizes, flip)
        running = None
        if ctx.sites is not None:
            pairs, saved = saved[: 2 * len(ctx.sites)], saved[2 * len(ctx.sites) :]
            running = dict(zip(ctx.sites, zip(pairs[::2], pairs[1::2], strict=True), strict=True))
        request = _layer_request(ctx.config, layout, ctx.reverse, reset, running, tensors)
        grads, needs = grads[:3], ctx.needs_input_grad[8:]
        if supports_grad_output(*grads, on_gpu=request.x.is_cuda):
            found = ctx.kernel.backward(request, saved, grads, needs)
        else:
            found = differentiable_layer_backward(request, grads, needs)
        return None, None, None, None, None, None, None, None, *found


# x, h0, c0 and the fields of Weights.
DIFFERENTIABLE = 3 + len(Weights._fields)


def _layer_request(
    config: Recurrence,
    layout: Layout,
    reverse: bool,
    reset: Tensor | None,
    running: Running | None,
    tensors: tuple[Tensor | None, ...],
) -> LayerRequest:
    x, h0, c0, *weights = tensors
    of = LayerRequest(config, x, h0, c0, Weights(*weights), layout, reverse, reset)  # type: ignore[arg-type]
    return of._replace(running=running)


def _rows_read(running: Running, start_step: int, steps: int) -> Running:
    """Copies of what `steps` steps from `start_step` read of the tables, which may be updated before the backward."""

    def rows(table: Tensor) -> Tensor:
        first = min(start_step, len(table) - 1)
        return table[first : max(start_step + steps, first + 1)].clone()

    return {site: (rows(mean), rows(var)) for site, (mean, var) in running.items()}


def differentiable_layer_backward(
    request: LayerRequest, grads: tuple[Tensor | None, ...], needs: tuple[bool, ...]
) -> list[Tensor | None]:
    """The gradients by the reference, which runs once more: for gradients of these gradients, for several gradients
    from above at once, and for forward-mode derivatives."""
    tensors: tuple[Tensor | None, ...] = (request.x, request.h0, request.c0, *request.weights)
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # A view of each, or a tensor that is given twice would get the sum of both gradients twice.
        tensors = tuple(t.view_as(t) if t is not None and n else t for t, n in zip(tensors, needs, strict=True))
        x, h0, c0, *weights = tensors
        again = reference_rnn.layer(
            request._replace(x=x, h0=h0, c0=c0, weights=Weights(*weights))  # type: ignore[arg-type]
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


class _TakeRows(torch.autograd.Function):
    """`rows.index_select(0, index)` for an index that names no row twice: the gradient of torch's adds row by row."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.count = len(rows)
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return put_rows(grad, index, ctx.count), None


def take_rows(rows: Tensor, index: Tensor) -> Tensor:
    """The rows that `index` names, none of them twice."""
    if rows.requires_grad and torch.is_grad_enabled():
        return _TakeRows.apply(rows, index)  # type: ignore[no-any-return]
    return rows.index_select(0, index)


def put_rows(rows: Tensor, index: Tensor, count: int) -> Tensor:
    """`count` rows, these where `index` says and zeros elsewhere."""
    return rows.new_zeros(count, *rows.shape[1:]).index_copy(0, index, rows)
