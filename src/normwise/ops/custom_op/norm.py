"""`torch.ops.normwise.norm`: a norm that ATen has no kernel for, by the reference. Its second derivative is the
reference's too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from normwise.backends import reference
from normwise.backends.reference import Moments, accumulation_dtype
from normwise.ops._torch_internals import register_decomposition


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


def _run_norm(
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


# Handed over: as decorators, those of torch.library look for our file among all modules, 3 ms of `import normwise`.
_norm = torch.library.custom_op("normwise::norm", _run_norm, mutates_args=())


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


def _run_norm_backward(
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


_norm_backward = torch.library.custom_op("normwise::norm_backward", _run_norm_backward, mutates_args=())


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
