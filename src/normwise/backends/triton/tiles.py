"""BatchNorm, GroupNorm and InstanceNorm: launches of the kernels that go over (samples, channels, positions)."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from normwise.backends.channels import channels_last
from normwise.backends.protocol import Moments, NormConfig, NormGradients, NormRequest, NormResult, RunningStatsRequest
from normwise.backends.triton import running_stats, runtime, settings
from normwise.backends.triton.memory import laid_out_like, mask_bytes, statistics, vector, wide


@dataclass(frozen=True)
class _View:
    """A dense tensor (N, C, ...) as (samples, channels, positions): channels last of BatchNorm, which tells no sample
    from another, are all positions of one sample.

    `strides` are of sample, channel and position. Each statistic is of `per_group` channels, of a sample where
    `by_sample`, which has `groups` of them.
    """

    x: Tensor
    samples: int
    channels: int
    positions: int
    strides: tuple[int, int, int]
    groups: int
    per_group: int
    by_sample: bool
    tiles: settings.Tiles

    @property
    def statistics(self) -> int:
        return self.samples * self.groups if self.by_sample else self.groups

    @property
    def of_statistics(self) -> tuple[int, int, int]:
        return self.statistics, self.groups, self.per_group

    @property
    def of_parts(self) -> tuple[int, ...]:
        """What the kernels that sum parts take."""
        t = self.tiles
        return self.samples, self.channels, self.positions, t.parts, t.chunks, t.samples_per_part, t.positions_per_part

    @property
    def parts_of_statistic(self) -> int:
        return self.tiles.chunks if self.by_sample else self.tiles.parts

    @property
    def part_grid(self) -> tuple[int, int]:
        return self.tiles.parts, runtime.blocks(self.channels, self.tiles.block_channels)

    @property
    def tile_chunks(self) -> int:
        return runtime.blocks(self.positions, self.tiles.block_positions)

    @property
    def tile_grid(self) -> tuple[int, int]:
        return self.samples * self.tile_chunks, self.part_grid[1]

    @property
    def constants(self) -> dict[str, Any]:
        t = self.tiles
        return {
            "WIDE": wide(self.x.dtype),
            "BLOCK_C": t.block_channels,
            "BLOCK_P": t.block_positions,
            "num_warps": t.num_warps,
        }

    @property
    def merging_block(self) -> int:
        return min(runtime.power_of_2(self.parts_of_statistic * self.per_group), 1024)


def _view(config: NormConfig, x: Tensor) -> _View:
    batch, channels, positions = x.shape[0], x.shape[1], prod(x.shape[2:])
    by_sample = config.family == "groups"
    last = channels_last(x)
    if not last:
        x = x.contiguous()
    of_rows = positions == 1 or last
    if of_rows and not by_sample:
        size, strides = (1, channels, batch * positions), (0, 1, channels)
    elif of_rows:
        size, strides = (batch, channels, positions), (channels * positions, 1, channels)
    else:
        size, strides = (batch, channels, positions), (channels * positions, positions, 1)
    groups = config.groups if by_sample else channels
    tiles = settings.of_tiles(*size, channels_last=of_rows, by_sample=by_sample, dtype=x.dtype)
    return _View(x, *size, strides, groups, channels // groups if groups else 0, by_sample, tiles)


def _mask(mask: Tensor | None, view: _View) -> tuple[Tensor | None, tuple[int, int, int]]:
    """The mask as bytes, and its strides of sample, channel and position."""
    if mask is None:
        return None, (0, 0, 0)
    batch, channels, *spatial = view.x.shape
    positions = prod(spatial)
    if mask.shape[1] == 1:
        of_sample = 0 if view.samples == 1 else positions
        return mask_bytes(mask, (batch, 1, *spatial)), (of_sample, 0, 1)
    of_sample = 0 if view.samples == 1 else channels * positions
    mask = mask.expand(view.x.shape)
    if view.strides[1] == 1:  # as x lies
        return mask_bytes(mask.movedim(1, -1), (batch, *spatial, channels)), (of_sample, 1, channels)
    return mask_bytes(mask, mask.shape), (of_sample, positions, 1)


def groups_forward(request: NormRequest, _needs_grad: bool) -> NormResult:
    """GroupNorm, and InstanceNorm with a group for each channel. Three launches."""
    view = _view(request.config, request.x)
    stats, moments = _statistics(request, view)
    y = _apply(request, view, stats)
    var, count = moments.view(2, view.samples, view.groups)
    updated = True if request.running_mean is None else None
    return NormResult(y, view.x, stats, updated, Moments(stats[0].view_as(var), var, count))


def channels_forward(request: NormRequest, _needs_grad: bool) -> NormResult:
    """BatchNorm. Four launches with running averages to update, three without, two where these are given."""
    config, running_mean, running_var, num_batches_tracked = request.config, *request[6:]
    view = _view(config, request.x)
    updated: Tensor | bool = True
    moments = None
    if not config.batch_statistics:
        stats = _given(request, view)
    else:
        stats, (var, count) = _statistics(request, view)
        if running_mean is not None and running_var is not None:
            averages = running_mean, running_var, num_batches_tracked
            updated = running_stats.update(RunningStatsRequest(*averages, config.momentum, stats[0], var, count))
        moments = Moments(stats[0], var, count)
    return NormResult(_apply(request, view, stats), view.x, stats, updated, moments)


def _statistics(request: NormRequest, view: _View) -> tuple[Tensor, Tensor]:
    """(2, statistics) each, float64: mean and reciprocal deviation; variance and count."""
    stats, moments = view.x.new_empty((2, 2, view.statistics), dtype=torch.float64).unbind(0)
    if view.x.numel() == 0:
        return stats.zero_(), moments.zero_()
    from normwise.backends.triton.kernels import tiles as kernels

    parts = view.x.new_empty((3, view.channels, view.tiles.parts), dtype=torch.float64).unbind(0)
    mask, mask_strides = _mask(request.mask, view)
    with runtime.on_device_of(view.x):
        kernels.moments_of_parts[view.part_grid](
            view.x, mask, *parts, *view.of_parts, *view.strides, *mask_strides, **view.constants
        )
        kernels.merge_moments[(view.statistics,)](
            *parts,
            stats,
            moments,
            *view.of_statistics,
            view.tiles.parts,
            view.parts_of_statistic,
            EPS=request.config.eps,
            BLOCK=view.merging_block,
        )
    return stats, moments


def _given(request: NormRequest, view: _View) -> Tensor:
    stats = view.x.new_empty((2, view.channels), dtype=torch.float64)
    if view.channels == 0:
        return stats
    from normwise.backends.triton.kernels.tiles import given_stats

    block = min(runtime.power_of_2(view.channels), 256)
    with runtime.on_device_of(view.x):
        given_stats[(runtime.blocks(view.channels, block),)](
            request.running_mean, request.running_var, stats, view.channels, EPS=request.config.eps, BLOCK=block
        )
    return stats


def _apply(request: NormRequest, view: _View, stats: Tensor) -> Tensor:
    config, _, residual, weight, bias, mask, *_ = request
    y = torch.empty_like(view.x)
    if y.numel() == 0:
        return y
    from normwise.backends.triton.kernels.tiles import tiles_forward

    mask, mask_strides = _mask(mask, view)
    with runtime.on_device_of(y):
        tiles_forward[view.tile_grid](
            view.x,
            None if residual is None else laid_out_like(residual, view.x),
            mask,
            vector(weight, view.channels),
            vector(bias, view.channels),
            stats,
            y,
            view.channels,
            view.positions,
            view.tile_chunks,
            *view.of_statistics,
            *view.strides,
            *mask_strides,
            ACT=config.act,
            BY_SAMPLE=view.by_sample,
            **view.constants,
        )
    return y


def backward(
    config: NormConfig,
    total: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    stats: Tensor,
    dy: Tensor,
    _dtotal: Tensor | None,
) -> NormGradients:
    """Of both families. Two to four launches: sums of parts, their means, the gradients of gain and bias, dx."""
    view = _view(config, total)
    x = view.x
    dx = torch.empty_like(x)
    dresidual = None if residual is None else torch.empty_like(x)
    dweight, dbias = (
        None if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (weight, bias)
    )
    if x.numel() == 0:
        return NormGradients(dx, dresidual, *(None if t is None else t.zero_() for t in (dweight, dbias)))
    from normwise.backends.triton.kernels import tiles as kernels
    from normwise.backends.triton.kernels.common import sum_of_parts

    weight, bias = vector(weight, view.channels), vector(bias, view.channels)
    mask, mask_strides = _mask(mask, view)
    tensors = (
        laid_out_like(dy, x),
        x,
        None if residual is None else laid_out_like(residual, x),
        mask,
        weight,
        bias,
        statistics(stats, view.statistics),
    )
    constants = {"ACT": config.act, "BY_SAMPLE": view.by_sample, **view.constants}
    strides = (*view.strides, *mask_strides)
    means = None
    with runtime.on_device_of(x):
        if config.batch_statistics or dweight is not None or dbias is not None:
            counts, dbiases, dweights = x.new_empty((3, view.channels, view.tiles.parts), dtype=torch.float64).unbind(0)
            kernels.gradients_of_parts[view.part_grid](
                *tensors, counts, dbiases, dweights, *view.of_parts, *view.of_statistics, *strides, **constants
            )
            if config.batch_statistics:
                means = x.new_empty((2, view.statistics), dtype=torch.float64)
                kernels.merge_gradients[(view.statistics,)](
                    counts,
                    dbiases,
                    dweights,
                    weight,
                    means,
                    *view.of_statistics,
                    view.tiles.parts,
                    view.parts_of_statistic,
                    BLOCK=view.merging_block,
                )
            if dweight is not None or dbias is not None:
                parts, columns = view.tiles.parts, min(runtime.power_of_2(view.channels), 16)
                sum_of_parts[(runtime.blocks(view.channels, columns),)](
                    dbiases,
                    dweights,
                    dbias,
                    dweight,
                    parts,
                    view.channels,
                    1,
                    parts,
                    BLOCK_PARTS=64,
                    BLOCK_COLUMNS=columns,
                )
        kernels.tiles_backward[view.tile_grid](
            *tensors,
            means,
            dx,
            dresidual,
            view.channels,
            view.positions,
            view.tile_chunks,
            *view.of_statistics,
            *strides,
            **constants,
        )
    return NormGradients(dx, dresidual, dweight, dbias)
