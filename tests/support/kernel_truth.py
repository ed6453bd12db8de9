"""What the kernels must compute: the textbook formulas in float64, differentiated by autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "hardsigmoid": lambda z: F.hardtanh(z, -3, 3) / 6 + 0.5,  # torch's own has a derivative with float32's digits
    "elu": F.elu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "softplus": F.softplus,
    "mish": F.mish,
}
ACTS = [None, "relu", "leaky_relu", "silu", "gelu"]  # tested with every combination of options
FURTHER_ACTS = [name for name in ACTIVATIONS if name not in ACTS]  # with few: the options' code is the same for all


def leaf(t: Tensor | None) -> Tensor | None:
    """`t` in float64, as a variable to differentiate by."""
    return None if t is None else t.detach().double().clone().requires_grad_()


def standardize(
    x: Tensor, dims: Sequence[int], mask: Tensor | None, eps: float, center: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """((x - mean) / sqrt(var + eps), mean, 1 / sqrt(var + eps)) over the valid elements of `dims`."""
    keep = torch.ones_like(x) if mask is None else mask.expand_as(x).to(x.dtype)
    x = torch.where(keep > 0, x, 0)
    count = keep.sum(dims, keepdim=True).clamp(min=1)
    mean = x.sum(dims, keepdim=True) / count if center else torch.zeros_like(count)
    centred = (x - mean) * keep
    rstd = (centred.square().sum(dims, keepdim=True) / count + eps).rsqrt()
    return centred * rstd, mean, rstd


def activate(z: Tensor, act: str | None, mask: Tensor | None) -> Tensor:
    """act(z), and 0 where the mask is False."""
    y = z if act is None else ACTIVATIONS[act](z)
    return y if mask is None else torch.where(mask, y, 0)


def opened(values: Tensor, act: str | None, mask: Tensor | None) -> Tensor:
    """What a gate multiplies by; invalid rows, whatever they hold, give a number."""
    values = values if mask is None else torch.where(mask, values, 0)
    gates = {None: lambda v: v, "silu": F.silu, "swish": F.silu, "sigmoid": torch.sigmoid, "gelu": F.gelu}
    return {**gates, "relu": F.relu}[act](values)


def tensor(*shape: int, dtype: torch.dtype, offset: int = 0, channels_last: bool = False) -> Tensor:
    """Random numbers whose storage starts `offset` elements late, so that no vector load is aligned."""
    size = 1
    for s in shape:
        size *= s
    flat = torch.randn(size + offset).to(dtype)[offset:]
    if channels_last and len(shape) > 2:
        return flat.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
    return flat.view(shape)
