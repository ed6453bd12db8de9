"""Norm layers against torch.nn's, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normwise
from benchmarks.case import Case
from benchmarks.layers import layer_case, tensor

IMAGES = [(32, 64, 56, 56), (128, 256, 14, 14), (2, 64, 112, 112)]
GROUPED = (8, 128, 56, 56)
SMALL_PLANES = [(16, 576, 6, 6), (16, 960, 3, 3), (64, 512, 4, 4)]
CONDITIONAL = [(32, 64, 28, 28), (16, 128, 14, 14)]
DIT = [(16, 256, 384), (16, 256, 768), (32, 256, 1152)]  # images, patches, features of S/2, B/2 and XL/2
MAMBA = [(8, 512, 1536), (8, 512, 2048)]
ROWS = [(8192, 768), (4096, 4096), (32768, 256), (512, 64), (1, 4096)]


def cases() -> Iterator[Case]:
    for shape in IMAGES:
        yield batch_norm(shape, must=0.55, aim=0.45)
    for shape in IMAGES:
        yield batch_norm(shape, channels_last=True, must=0.80, aim=0.65)
    yield batch_norm((4096, 512), must=0.80, aim=0.65)
    for shape in SMALL_PLANES:
        yield batch_norm(shape, must=1.0, aim=0.60)
    for shape in CONDITIONAL:
        for last in (False, True):
            yield conditional_batch_norm(shape, channels_last=last, must=0.70, aim=0.40)
    yield conditional_batch_norm((4096, 512), must=0.90, aim=0.70)
    for rows in ROWS:
        yield layer_norm(rows, must=0.85, aim=0.70)
    yield layer_case("RMSNorm (8192, 768)", normwise.RMSNorm(768), nn.RMSNorm(768), [tensor((8192, 768))])
    for last in (False, True):
        yield group_norm(channels_last=last)
    for last in (False, True):
        yield instance_norm(channels_last=last)
    yield layer_norm((8192, 768), dtype=torch.bfloat16)
    yield batch_norm(IMAGES[0], dtype=torch.bfloat16)
    for shape in DIT:
        yield adaptive_layer_norm(shape, must=0.60, aim=0.40)
    yield adaptive_layer_norm(DIT[1], dtype=torch.bfloat16)
    yield adaptive_layer_norm(DIT[1], by_position=True)
    for shape in MAMBA:
        yield gated_rms_norm(shape, gate_first=True, must=0.40, aim=0.25)
    yield gated_rms_norm(MAMBA[0], gate_first=False, must=0.40, aim=0.25)
    yield gated_rms_norm(MAMBA[0], gate_first=True, dtype=torch.bfloat16)
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


def adaptive_layer_norm(
    shape: tuple[int, int, int],
    *,
    by_position: bool = False,
    dtype: torch.dtype = torch.float32,
    must: float | None = None,
    aim: float | None = None,
) -> Case:
    """adaLN: scale and shift by sample or position, against a multiplication and an addition behind the norm."""
    samples, _, features = shape
    ours, theirs = (library.LayerNorm(features, elementwise_affine=False) for library in (normwise, nn))
    of_scale = shape if by_position else (samples, 1, features)
    given = [tensor(shape, dtype=dtype), *(tensor(of_scale, dtype=dtype) for _ in range(2))]
    name = f"LayerNorm, scale and shift by {'position' if by_position else 'sample'} {shape}" + _suffix(dtype)
    return layer_case(
        name,
        ours,
        theirs,
        given,
        our_step=_modulated,
        their_step=_then_modulated,
        tensors_moved=9 if by_position else 5,
        must=must,
        aim=aim,
    )


def conditional_batch_norm(
    shape: tuple[int, ...], *, channels_last: bool = False, must: float | None = None, aim: float | None = None
) -> Case:
    """Scale and shift by sample and channel, against a multiplication and an addition behind the norm."""
    kind = "BatchNorm2d" if len(shape) == 4 else "BatchNorm1d"
    ours, theirs = (getattr(library, kind)(shape[1], affine=False) for library in (normwise, nn))
    by_sample = (*shape[:2], *(1,) * (len(shape) - 2))
    given = [tensor(shape, channels_last=channels_last), tensor(by_sample), tensor(by_sample)]
    return layer_case(
        f"BatchNorm, scale and shift by sample {shape}" + (" channels-last" if channels_last else ""),
        ours,
        theirs,
        given,
        our_step=_modulated,
        their_step=_then_modulated,
        must=must,
        aim=aim,
    )


def gated_rms_norm(
    shape: tuple[int, int, int],
    *,
    gate_first: bool,
    dtype: torch.dtype = torch.float32,
    must: float | None = None,
    aim: float | None = None,
) -> Case:
    """Mamba-2's gated norm, in both orders."""
    ours = normwise.RMSNorm(shape[-1], eps=1e-5, gate_first=gate_first).to(dtype)
    theirs = nn.RMSNorm(shape[-1], eps=1e-5).to(dtype)
    name = f"RMSNorm, gate {'first' if gate_first else 'last'} {shape}" + _suffix(dtype)
    return layer_case(
        name,
        ours,
        theirs,
        [tensor(shape, dtype=dtype), tensor(shape, dtype=dtype)],
        our_step=_gated,
        their_step=_after_gate if gate_first else _before_gate,
        tensors_moved=8,
        must=must,
        aim=aim,
    )


def _modulated(layer: nn.Module, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
    x, scale, shift = inputs
    return (layer(x, scale=scale, shift=shift),)


def _then_modulated(layer: nn.Module, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
    x, scale, shift = inputs
    return (layer(x) * (1 + scale) + shift,)


def _gated(layer: nn.Module, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
    return (layer(inputs[0], gate=inputs[1]),)


def _after_gate(layer: nn.Module, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
    return (layer(inputs[0] * F.silu(inputs[1])),)


def _before_gate(layer: nn.Module, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
    return (layer(inputs[0]) * F.silu(inputs[1]),)


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
