"""Gradients of what the compiled kernels compute: one autograd.Function a family of operations.

All that a backward needs goes through `save_for_backward`, so that version counters, checkpointing and saved-tensor
hooks see it. Second derivatives are the reference's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normwise.backends.protocol import NormConfig, NormFamily, NormRequest
from normwise.backends.reference.norms import backward as differentiable_backward
from normwise.ops.dispatch import is_traced_or_transformed, readable


def requires_grad(request: NormRequest) -> bool:
    """Whether a gradient of the request may be asked for."""
    _, x, residual, weight, bias, *_ = request
    return (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    )


def supports_grad_output(*tensors: Tensor | None) -> bool:
    """Whether a kernel's backward may take these: upstream gradients that nobody differentiates again, or in forward
    mode, and that are no batch of gradients (torch.func.vmap, is_grads_batched) nor another kind of tensor; and saved
    tensors, in whose place a hook may have put anything."""
    return (
        not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not is_traced_or_transformed()
        and readable(*tensors)
    )


class Norm(torch.autograd.Function):
    """A norm of any family by kernels that autograd does not see."""

    @staticmethod
    def forward(
        ctx: Any,
        family: NormFamily,
        config: NormConfig,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        mask: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        num_batches_tracked: Tensor | None,
    ) -> Any:
        result = family.forward(
            config, x, residual, weight, bias, mask, running_mean, running_var, num_batches_tracked, True
        )
        y, total, stats, updated, moments, _ = result
        # Residual and bias are needed again only to know where the activation was flat.
        added_after = None if config.act is None or config.family == "features" else residual
        ctx.save_for_backward(total, added_after, weight, bias if config.act is not None else None, mask, stats)
        ctx.bias = None if bias is None else (bias.shape, bias.dtype)
        ctx.family, ctx.config = family, config
        ctx.set_materialize_grads(False)
        # As an output only where it is one, x + residual: an input returned as it is would become a view of itself.
        return y, total if config.family == "features" and residual is not None else None, None, updated, moments, None

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dtotal: Tensor | None = None, *_: Any) -> Any:
        total, residual, weight, bias, mask, stats = saved = ctx.saved_tensors
        config = ctx.config
        if ctx.bias is not None and bias is None:
            shape, dtype = ctx.bias
            bias = total.new_empty(shape, dtype=dtype)  # its values do not matter
        if dy is None:
            dy = torch.zeros_like(total)
        compiled = supports_grad_output(dy, dtotal, *saved)
        backward = ctx.family.backward if compiled else differentiable_backward
        grads = backward(config, total, residual, weight, bias, mask, stats, dy, dtotal)
        dresidual = None
        if ctx.needs_input_grad[3]:
            dresidual = grads.residual
            if dresidual is None:  # no activation follows it
                dresidual = dy if mask is None else dy.masked_fill(~mask, 0)
        return None, None, grads.x, dresidual, grads.weight, grads.bias, None, None, None, None
