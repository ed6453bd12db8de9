"""Norm layers against torch.nn's, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

import normwise
from benchmarks.case import Case
from benchmarks.layers import layer_case, tensor

IMAGES = [(32, 64, 56, 56), (128, 256, 14, 14), (2, 64, 112, 112)]
GROUPED = (8, 128, 56, 56)
ROWS = [(8192, 768), (4096, 4096), (32768, 256), (512, 64), (1, 4096)]


def cases() -> Iterator[Case]:
    for shape in IMAGES:
        yield batch_norm(shape, must=0.55, aim=0.45)
    for shape in IMAGES:
        yield batch_norm(shape, channels_last=True, must=0.80, aim=0.65)
    yield batch_norm((4096, 512), must=0.80, aim=0.65)
    for rows in ROWS:
        yield layer_norm(rows, must=0.85, aim=0.70)
    yield layer_case("RMSNorm (8192, 768)", normwise.RMSNorm(768), nn.RMSNorm(768), [tensor((8192, 768))])
    for last in (False, True):
        yield group_norm(channels_last=last)
    for last in (False, True):
        yield instance_norm(channels_last=last)
    yield layer_norm((8192, 768), dtype=torch.bfloat16)
    yield batch_norm(IMAGES[0], dtype=torch.bfloat16)
    # Small ones, where the call itself is what costs.
    for rows in [(1, 64), (32, 128)]:
        yield layer_norm(rows, must=1.0)
    for rows in [(2, 64), (32, 128)]:
        yield batch_norm(rows, must=1.0)


def batch_norm(
    shape: tuple[int, ...],
    *,
    channels_last: bool = False,
    dtype: torch.dtype = torch.float32,
    must: float | None = None,
    aim: float | None = None,
) -> Case:
    kind = "BatchNorm2d" if len(shape) == 4 else "BatchNorm1d"
    name = f"BatchNorm {shape}" + (" channels-last" if channels_last else "") + _suffix(dtype)
    ours, theirs = getattr(normwise, kind)(shape[1]), getattr(nn, kind)(shape[1])
    x = tensor(shape, channels_last=channels_last, dtype=dtype)
    return layer_case(name, ours, theirs, [x], must=must, aim=aim)


def layer_norm(
    shape: tuple[int, int], *, dtype: torch.dtype = torch.float32, must: float | None = None, aim: float | None = None
) -> Case:
    ours, theirs = (library.LayerNorm(shape[1]).to(dtype) for library in (normwise, nn))
    name = f"LayerNorm {shape}" + _suffix(dtype)
    return layer_case(name, ours, theirs, [tensor(shape, dtype=dtype)], must=must, aim=aim)


def group_norm(*, channels_last: bool) -> Case:
    shape = GROUPED
    name = f"GroupNorm(32) {shape}" + (" channels-last" if channels_last else "")
    ours, theirs = (library.GroupNorm(32, shape[1]) for library in (normwise, nn))
    return layer_case(name, ours, theirs, [tensor(shape, channels_last=channels_last)], aim=0.70)


def instance_norm(*, channels_last: bool) -> Case:
    shape = (8, 64, 112, 112)
    name = f"InstanceNorm {shape}" + (" channels-last" if channels_last else "")
    ours, theirs = (library.InstanceNorm2d(shape[1], affine=True) for library in (normwise, nn))
    return layer_case(name, ours, theirs, [tensor(shape, channels_last=channels_last)], aim=0.70)


def _suffix(dtype: torch.dtype) -> str:
    return "" if dtype == torch.float32 else f" {str(dtype).removeprefix('torch.')}"
