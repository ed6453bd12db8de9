"""Layers with scale= and shift= in the call, and what they equal."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normwise

N, C = 3, 4
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


class Case(NamedTuple):
    make: Callable[..., nn.Module]
    shape: tuple[int, ...]
    sample: tuple[int, ...]  # of a scale by sample
    placed: tuple[int, ...]  # the same with as many axes as the input


def channels(make: Callable[..., nn.Module], *positions: int) -> Case:
    return Case(make, (N, C, *positions), (N, C), (N, C, *(1,) * len(positions)))


CASES = {
    "layer": Case(lambda: normwise.LayerNorm(C), (N, 5, C), (N, C), (N, 1, C)),
    "layer of rows": Case(lambda: normwise.LayerNorm(C), (N, C), (N, C), (N, C)),
    "layer of two axes": Case(lambda: normwise.LayerNorm((5, C)), (N, 2, 5, C), (N, 5, C), (N, 1, 5, C)),
    "layer, dim=1": Case(lambda: normwise.LayerNorm(C, dim=1), (N, C, 5, 2), (N, C), (N, C, 1, 1)),
    "layer, offset": Case(lambda: normwise.LayerNorm(C, offset=1.0, act="gelu"), (N, 5, C), (N, C), (N, 1, C)),
    "rms": Case(lambda: normwise.RMSNorm(C, eps=1e-5), (N, 5, C), (N, C), (N, 1, C)),
    "group": channels(lambda: normwise.GroupNorm(2, C, act="silu"), 5, 2),
    "group of channels": channels(lambda: normwise.GroupNorm(C, C), 5),
    "group, no bias": channels(lambda: normwise.GroupNorm(2, C, bias=False), 7),
    "instance1d": channels(lambda: normwise.InstanceNorm1d(C), 7),
    "instance2d": channels(lambda: normwise.InstanceNorm2d(C, affine=True, track_running_stats=True), 5, 2),
    "instance3d": channels(lambda: normwise.InstanceNorm3d(C, affine=True), 2, 2, 3),
    "batch1d": channels(lambda: normwise.BatchNorm1d(C, act="relu")),
    "batch2d": channels(lambda: normwise.BatchNorm2d(C), 5, 2),
    "batch3d": channels(lambda: normwise.BatchNorm3d(C, affine=False), 2, 2, 3),
    "ghost": channels(lambda: normwise.BatchNorm1d(C, virtual_batch_size=2), 7),
    "sync": channels(lambda: normwise.SyncBatchNorm(C), 7),
    "renorm": channels(lambda: normwise.BatchRenorm2d(C, r_max=2, d_max=1), 5, 2),
    "frozen": channels(lambda: normwise.FrozenBatchNorm2d(C), 5, 2),
}


def made(name: str, dtype: torch.dtype = torch.float32, training: bool = True) -> nn.Module:
    layer = CASES[name].make()
    for t in (*layer.parameters(), *layer.buffers()):
        if t.is_floating_point():
            nn.init.uniform_(t, 0.5, 1.5)
    return layer.to(dtype).train(training)


def in_float64(layer: nn.Module, x: Tensor, scale: Tensor | None, shift: Tensor | None, **given: Any) -> Tensor:
    """The formula, written behind the layer itself without its activation."""
    layer = copy.deepcopy(layer).double()
    act, layer.act = layer.act, None
    y = layer(x, **given)
    y = y if scale is None else y * (1 + scale)
    y = y if shift is None else y + shift
    return y if act is None else getattr(F, act)(y)


def leaves(*tensors: Tensor, dtype: torch.dtype) -> list[Tensor]:
    return [t.to(dtype).detach().requires_grad_() for t in tensors]
