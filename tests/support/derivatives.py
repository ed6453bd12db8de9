"""What a layer computes, to the second derivative: for layers that are compared with one another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from support.norm_cases import added


def derivatives(layer: nn.Module, tensors: dict[str, Tensor], more: dict[str, Any]) -> dict[str, Tensor]:
    """Output, gradients, and the gradients of a random function of the input's gradient, all by name.

    `tensors` holds "x", the gradients "upstream" and "second" that are fed in, and perhaps "residual"; `more` are
    further arguments of the call. The layer is called once.
    """
    x = tensors["x"].clone().requires_grad_()
    inputs = {"x": x}
    if "residual" in tensors:
        inputs["residual"] = tensors["residual"].clone().requires_grad_()
        more = more | added(layer, inputs["residual"])
    y = layer(x, **more)
    y = y[0] if isinstance(y, tuple) else y
    leaves = inputs | dict(layer.named_parameters())
    first = torch.autograd.grad(y, list(leaves.values()), tensors["upstream"], retain_graph=True)
    upstream = tensors["upstream"].clone().requires_grad_()
    differentiable = torch.autograd.grad(y, x, upstream, create_graph=True)[0]
    targets = leaves | {"upstream": upstream}
    second = torch.autograd.grad(differentiable, list(targets.values()), tensors["second"], allow_unused=True)
    return {
        "output": y.detach(),
        **{f"grad {n}": g for n, g in zip(leaves, first, strict=True)},
        "grad x, differentiable": differentiable.detach(),
        **{f"second grad {n}": g for n, g in zip(targets, second, strict=True) if g is not None},
    }
