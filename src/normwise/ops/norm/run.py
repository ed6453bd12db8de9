"""How every norm gets from validated arguments to a backend and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from normwise.backends import reference
from normwise.backends.devices import on_cpu
from normwise.backends.protocol import NormRequest, NormResult
from normwise.ops import autograd, custom_op, dispatch
from normwise.ops.dispatch import is_masked_batch, resolve
from normwise.ops.norm import masked, running_stats


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
