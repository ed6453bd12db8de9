"""`torch.ops.normwise.kernel_norm`: a norm of any family by kernels that autograd does not see.

Like the node of a recurrent layer it states the backend that `resolve` chose while the call was traced. It changes
nothing in place: running averages are moved by the moments that it returns, in operations that a compiler sees. The
second derivative is the reference's.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from normwise.backends.protocol import Moments, NormConfig, NormFamily, NormRequest, NormResult
from normwise.backends.reference.norms import backward as differentiable_backward
from normwise.ops.custom_op.backends import required


def kernel_norm(backend: str, request: NormRequest, needs_grad: bool) -> NormResult:
    """A request by the kernels of a `backend` as one node; its running averages are not moved yet."""
    config, x, residual, weight, bias, mask, running_mean, running_var, _ = request
    update = config.batch_statistics and running_mean is not None
    given = (None, None) if config.batch_statistics else (running_mean, running_var)
    y, total, stats, moments = torch.ops.normwise.kernel_norm(
        x, residual, weight, bias, mask, *given, *_flattened(config), backend, update, needs_grad
    )
    found = None
    if update:
        shape = (x.shape[0], config.groups) if config.family == "groups" else (-1,)
        found = Moments(*(m.detach().view(shape) for m in (stats[0], *moments.unbind(0))))
    return NormResult(y, total if _returns_total(config, residual) else x, None, None if update else True, found)


_TENSORS = "Tensor? weight, Tensor? bias, Tensor? mask"
_CONFIG = (
    "str op, str family, float eps, str? act, int axes, SymInt groups, bool center, bool batch_statistics, str backend"
)
_NUM_CONFIG = 9  # with the backend

# y; x + residual, where the statistics are of that; mean and 1 / sqrt(var + eps), if a backward or an update follows;
# variance and count, if an update does. Empty where there is none.
torch.library.define(
    "normwise::kernel_norm",
    f"(Tensor x, Tensor? residual, {_TENSORS}, Tensor? mean, Tensor? var, {_CONFIG}, bool update, bool save)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)
# The gradients of x, of the residual that an activation follows, and of gain and bias; empty where there is none.
torch.library.define(
    "normwise::kernel_norm_backward",
    f"(Tensor total, Tensor? residual, {_TENSORS}, Tensor stats, Tensor dy, Tensor? dtotal, {_CONFIG})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)


def _flattened(config: NormConfig) -> tuple[Any, ...]:
    op, family, eps, act, axes, groups, center, batch_statistics, *_ = config
    return op, family, eps, act, axes, groups, center, batch_statistics


def _returns_total(config: NormConfig, residual: Tensor | None) -> bool:
    return residual is not None and config.family == "features"


def _family(described: tuple[Any, ...]) -> tuple[NormFamily, NormConfig]:
    """From what `_CONFIG` names."""
    *flattened, backend = described
    config = NormConfig(*flattened)
    return required(backend).norm.kernels[config.family], config


@torch.library.impl("normwise::kernel_norm", ("cpu", "cuda"))
def _run(*arguments: Any) -> tuple[Tensor, ...]:
    x, residual, weight, bias, mask, mean, var, *described, update, save = arguments
    family, config = _family(tuple(described))
    y, total, stats, _, moments, _ = family.forward(
        config, x, residual, weight, bias, mask, mean, var, None, update or save
    )
    assert stats is None or isinstance(stats, Tensor)
    of_update = None
    if update:
        assert moments is not None
        of_update = torch.stack([moments.var.flatten(), moments.count.flatten()])
    found = (
        y,
        total if _returns_total(config, residual) else None,
        stats if update or save else None,
        of_update,
    )
    return tuple(x.new_empty(0) if t is None else t for t in found)


@torch.library.register_fake("normwise::kernel_norm")
def _(*arguments: Any) -> tuple[Tensor, ...]:
    x, residual, *_, update, save = arguments
    config = NormConfig(*arguments[7:-3])
    stats, nothing = x.new_empty((2, _num_statistics(config, x)), dtype=torch.float64), x.new_empty(0)
    return (
        _laid_out(config, x),
        _laid_out(config, x) if _returns_total(config, residual) else nothing,
        stats if update or save else x.new_empty(0),
        torch.empty_like(stats) if update else x.new_empty(0),
    )


def _num_statistics(config: NormConfig, x: Tensor) -> int:
    if config.family == "features":
        return prod(x.shape[: x.dim() - config.axes])
    return x.shape[0] * config.groups if config.family == "groups" else x.shape[1]


def _laid_out(config: NormConfig, x: Tensor) -> Tensor:
    """A new tensor as the kernels lay out what is like x: channels last where those of x are, else contiguous."""
    last = config.family != "features" and not x.is_contiguous() and x.movedim(1, -1).is_contiguous()
    return torch.empty_like(x) if last else x.new_empty(x.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, bias, mask, _, _, *described, _, _ = inputs
    config = NormConfig(*described[:-1])
    of_total, ctx.described, ctx.config = _returns_total(config, residual), described, config
    after = residual if config.act is not None and not of_total else None
    # The gain is not read again for the sake of an activation's slope alone, nor the bias: but they say that their
    # gradients are wanted, and of which shape.
    ctx.save_for_backward(output[1] if of_total else x, after, weight, bias, mask, output[2])
    ctx.has_residual = residual is not None
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dy: Tensor | None, dtotal: Tensor | None, *_: Any) -> tuple[Any, ...]:
    total, after, weight, bias, mask, stats = ctx.saved_tensors  # once: checkpointing allows one look
    if dy is None:
        dy = torch.zeros_like(total)
    of_total = ctx.has_residual and ctx.config.family == "features"
    dx, dafter, dweight, dbias = torch.ops.normwise.kernel_norm_backward(
        total, after, weight, bias, mask, stats, dy, dtotal if of_total else None, *ctx.described
    )
    dresidual = None
    if ctx.has_residual and ctx.needs_input_grad[1]:
        if of_total:
            dresidual = dx
        elif after is not None:
            dresidual = dafter
        else:
            dresidual = dy if mask is None else dy.masked_fill(~mask, 0)
    of_parameters = (None if weight is None else dweight, None if bias is None else dbias)
    return dx, dresidual, *of_parameters, *(None,) * (len(ctx.needs_input_grad) - 4)


torch.library.register_autograd("normwise::kernel_norm", _differentiate, setup_context=_setup)


@torch.library.impl("normwise::kernel_norm_backward", ("cpu", "cuda"))
def _run_backward(*arguments: Any) -> tuple[Tensor, ...]:
    family, config = _family(arguments[8:])
    assert family.backward is not None
    total, residual = arguments[:2]
    dx, dresidual, dweight, dbias, _ = family.backward(config, *arguments[:8])
    found = (dx, None if residual is None else dresidual, dweight, dbias)
    return tuple(total.new_empty(0) if t is None else t for t in found)


@torch.library.register_fake("normwise::kernel_norm_backward")
def _(*arguments: Any) -> tuple[Tensor, ...]:
    total, residual, weight, bias = arguments[:4]
    config = NormConfig(*arguments[8:-1])
    return (
        _laid_out(config, total),
        total.new_empty(0) if residual is None else _laid_out(config, total),
        *(total.new_empty(0) if t is None else t.new_empty(t.shape) for t in (weight, bias)),
    )


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:8])
    ctx.config = NormConfig(*inputs[8:-1])
    ctx.set_materialize_grads(False)


def _differentiate_backward(ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
    """The second derivative: that of the reference's first one."""
    saved = list(ctx.saved_tensors)
    needs = ctx.needs_input_grad[:8]
    with torch.enable_grad():
        for n, needed in enumerate(needs):
            if needed:
                saved[n] = saved[n].detach().requires_grad_()
        first = differentiable_backward(ctx.config, *saved)
        outputs, grads = [], []
        for f, u in zip(first[:4], upstream, strict=True):
            if f is not None and u is not None and u.numel() == f.numel() and f.requires_grad:
                outputs.append(f)
                grads.append(u)
        wanted = [t for t, needed in zip(saved, needs, strict=True) if needed]
        found = iter(torch.autograd.grad(outputs, wanted, grads, allow_unused=True))
    second = [next(found) if needed else None for needed in needs]
    return *second, *(None,) * _NUM_CONFIG


torch.library.register_autograd(
    "normwise::kernel_norm_backward", _differentiate_backward, setup_context=_setup_backward
)
