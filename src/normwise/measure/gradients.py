"""The sizes of gradients, and the gradients of a loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn


def gradient_norm(gradient: Tensor, *, fast: bool = False) -> float:
    """The Euclidean norm.

    In float64, since that of a vanishing gradient in float32 would be 0: its squares are too small for that. `fast`
    stays in the gradient's own dtype, but for half precision, in which a norm is soon infinite.
    """
    dtype = torch.promote_types(gradient.dtype, torch.float32) if fast else torch.float64
    return float(torch.linalg.vector_norm(gradient, dtype=dtype))


def squared_norm(gradient: Tensor, *, fast: bool = False) -> float:
    """The square of `gradient_norm`; infinite where that has no square."""
    norm = gradient_norm(gradient, fast=fast)
    return norm * norm


def total_norm(gradients: Iterable[Tensor]) -> float:
    """The Euclidean norm of all of them together; NaN where one is."""
    return math.sqrt(sum(map(squared_norm, gradients)))


def root_mean(squares: Sequence[float]) -> float:
    """The root of the mean of the squared norms of several batches."""
    return math.sqrt(sum(squares) / len(squares))


def loss_and_gradients(
    loss: Callable[[], Tensor], parameters: Mapping[str, nn.Parameter]
) -> tuple[float, dict[str, Tensor]]:
    """The value of a loss, and its gradient with respect to those of the parameters that it depends on, by name.

    `.grad` is left alone.
    """
    wanted = {name: p for name, p in parameters.items() if p.requires_grad}
    with torch.enable_grad():
        value = loss()
        found = torch.autograd.grad(value, list(wanted.values()), allow_unused=True) if wanted else ()
    return float(value.detach()), {n: g.detach() for n, g in zip(wanted, found, strict=True) if g is not None}
