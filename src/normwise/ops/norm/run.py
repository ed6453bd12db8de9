"""How every norm gets from validated arguments to a backend and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from normwise.backends import reference
from normwise.backends.devices import on_cpu
from normwise.backends.protocol import Gate, Moments, NormRequest, NormResult, accumulation_dtype
from normwise.ops import autograd, custom_op, dispatch
from normwise.ops.dispatch import is_masked_batch, resolve
from normwise.ops.norm import masked, running_stats
from normwise.ops.norm.running_stats import Updated


def run(request: NormRequest, formula: Callable[..., Any] | None = None, known_readable: bool = False) -> NormResult:
    """Run a request, in canonical form, on the backend that `resolve` names, and update running statistics.

    `formula`, with the signature of `reference.norm`, takes the statistics from elsewhere (several ranks).
    `known_readable`: see `resolve`.
    """
    needs_grad = torch.is_grad_enabled() and autograd.requires_grad(request)
    if formula is None:
        backend, _ = resolve(request, "norm", known_readable)
        family = backend.norm.kernels[request.config.family]
        if backend.name == "aten" and is_masked_batch(request):
            result = masked.run(backend.norm.kernels["masked"], request, needs_grad)
        elif family.backward is not None and torch.compiler.is_compiling():
            result = custom_op.norm_by_kernels(backend.name, request, needs_grad)
        elif backend.name == "aten" and (update := running_stats.kernel_for(request)) is not None:
            result = backend.norm.kernels["channels_with_stats"].forward(*request, needs_grad)
            result = result._replace(stats_updated=update(result))
        elif family.backward is not None and needs_grad:
            result = NormResult(*autograd.Norm.apply(family, request, *request[1:5]))
        elif torch.compiler.is_compiling() and backend.name == "reference" and on_cpu(request.x):
            # On a GPU the compiler fuses the formula's operations, and could do nothing with one node.
            result = reference.norms.run(custom_op.norm, *request, needs_grad)
        else:
            result = family.forward(*request, needs_grad)
    else:
        dispatch.reference_only(request.config.op, "statistics of several ranks are the reference's alone")
        result = reference.norms.run(formula, *request, needs_grad)
    if result.stats_updated is None:
        result = result._replace(stats_updated=running_stats.update(request, result))
    return result


def run_modulated(request: NormRequest, gate: Gate | None, known_readable: bool) -> NormResult | None:
    """A norm of features with a gain and bias by sample or position, and a gate, or a batch norm with those by sample,
    by one kernel; None where there is none for it, and nothing has changed."""
    family = dispatch.modulated_kernel(request, gate, known_readable)
    if family is None:
        return None
    if request.config.family == "features" and not request.x.is_contiguous():
        request = request._replace(x=request.x.contiguous())  # once, for the backward too
    needs_grad = torch.is_grad_enabled() and autograd.requires_grad(request)
    if gate is None:
        if needs_grad:
            return NormResult(*autograd.Norm.apply(family, request, *request[1:5]))
        return family.forward(*request, False)
    if needs_grad or (torch.is_grad_enabled() and gate.values.requires_grad):
        y, total = autograd.GatedNorm.apply(family, request, gate.act, gate.first, *request[1:5], gate.values)
        return NormResult(y, request.x if total is None else total)
    return family.forward(*request, False, gate)


def run_with_correction(
    request: NormRequest, formula: Callable[..., Any] | None, correction: int
) -> tuple[Tensor, Updated]:
    """The result of a batch norm in training whose running variance is of squares over count - `correction`, and
    whether the running statistics were updated.

    Backends know the unbiased variance alone: averages that a momentum of 1 replaces by it say what the batch's moments
    are."""
    x, valid = request.x, request.mask
    wide = accumulation_dtype(x.dtype)
    mean, var = (torch.zeros(x.shape[1], dtype=wide, device=x.device) for _ in range(2))
    config = request.config._replace(momentum=1.0)
    bare = request._replace(config=config, running_mean=mean, running_var=var, num_batches_tracked=None)
    result = run(bare, formula)
    count = (
        result.moments.count if result.moments is not None else reference.count_valid(x, (0, *range(2, x.dim())), valid)
    )
    count = count.to(wide).expand(1, x.shape[1], *(1,) * (x.dim() - 2)).reshape(-1)
    if isinstance(result.stats_updated, Tensor):
        mean = torch.where(result.stats_updated, mean, torch.nan)
    elif result.stats_updated is False:
        mean = torch.full_like(mean, torch.nan)
    moments = Moments(mean, var * ((count - 1).clamp(min=0) / count.clamp(min=1)), count)
    stats = (request.running_mean, request.running_var, request.num_batches_tracked)
    return result.y, running_stats.update_from_moments(request.config, *stats, moments, correction)  # type: ignore[arg-type]
