"""Norm, residual and activation in one pass, against the fastest way to write them with torch.nn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normwise
from benchmarks.case import Case
from benchmarks.layers import layer_case, tensor
from benchmarks.norms import GROUPED, IMAGES


def cases() -> Iterator[Case]:
    for shape in IMAGES:
        ours, theirs = normwise.BatchNorm2d(shape[1], act="relu"), nn.BatchNorm2d(shape[1])
        name = f"BatchNorm + ReLU {shape}"
        yield layer_case(name, ours, theirs, [tensor(shape)], their_step=_relu, must=0.50, aim=0.35)
    shape = IMAGES[0]
    yield layer_case(
        f"BatchNorm + residual + ReLU {shape}",
        normwise.BatchNorm2d(64, act="relu"),
        nn.BatchNorm2d(64),
        [tensor(shape), tensor(shape)],
        our_step=_with_residual,
        their_step=_add_relu,
        tensors_moved=8,
    )
    for rows in [(8192, 768), (4096, 4096), (32768, 256)]:
        yield layer_case(
            f"residual add + LayerNorm {rows}",
            normwise.LayerNorm(rows[1]),
            nn.LayerNorm(rows[1]),
            [tensor(rows), tensor(rows)],
            our_step=_pair,
            their_step=_add_norm,
            tensors_moved=8,
            must=0.78,
            aim=0.65,
        )
    yield layer_case(
        "LayerNorm + GELU (8192, 768)",
        normwise.LayerNorm(768, act="gelu"),
        nn.LayerNorm(768),
        [tensor((8192, 768))],
        their_step=_gelu,
    )
    for last in (False, True):
        yield layer_case(
            f"GroupNorm(32) + SiLU {GROUPED}{' channels-last' if last else ''}",
            normwise.GroupNorm(32, GROUPED[1], act="silu"),
            nn.GroupNorm(32, GROUPED[1]),
            [tensor(GROUPED, channels_last=last)],
            their_step=_silu,
            aim=0.70,
        )
    yield _masked(channels_last=False)
    yield _masked(channels_last=True)


def _masked(channels_last: bool) -> Case:
    """What a mask costs: ours with one against ours without."""
    shape = IMAGES[0]
    mask = torch.rand(shape[0], *shape[2:]) < 0.8
    return layer_case(
        f"masked BatchNorm {shape}{' channels-last' if channels_last else ''}",
        normwise.BatchNorm2d(64),
        normwise.BatchNorm2d(64),
        [tensor(shape, channels_last=channels_last)],
        our_step=lambda layer, inputs: (layer(inputs[0], mask=mask),),
        against="normwise without a mask",
        must=1.15,
        aim=1.0,
    )


def _relu(layer: nn.Module, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
    return (F.relu_(layer(inputs[0])),)


def _gelu(layer: nn.Module, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
    return (F.gelu(layer(inputs[0])),)


def _silu(layer: nn.Module, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
    return (F.silu(layer(inputs[0])),)  # in place it is slower: autograd then keeps a copy of what is overwritten


def _with_residual(layer: nn.Module, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
    return (layer(inputs[0], residual=inputs[1]),)


def _add_relu(layer: nn.Module, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
    return (F.relu_(layer(inputs[0]).add_(inputs[1])),)


def _pair(layer: nn.Module, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
    return layer(inputs[0], add=inputs[1])  # type: ignore[no-any-return]


def _add_norm(layer: nn.Module, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
    s = inputs[0] + inputs[1]
    return layer(s), s
