"""The C++ norm kernels as functions of tensors: requests made out of arguments."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from normwise.backends.cpu.memory import parameter_dtype
from normwise.backends.cpu.norms import FAMILIES
from normwise.backends.protocol import NormConfig


def _wide(t: Tensor | None, x: Tensor) -> Tensor | None:
    """A gain or bias in the dtype that kernels compute with, so that its gradient comes in it."""
    return None if t is None else t.to(parameter_dtype(x.dtype))


class Rows(NamedTuple):
    y: Tensor
    sum: Tensor  # x + residual
    stats: Tensor  # (2, rows): mean and rstd


def rows_forward(
    x: Tensor,
    cols: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    center: bool = True,
    act: str | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
) -> Rows:
    """LayerNorm, or RMSNorm if not `center`, of the last axis of x (rows, cols); mask (rows,)."""
    assert x.shape[1] == cols
    config = NormConfig("layer_norm", "features", eps, act, center=center)
    valid = None if mask is None else mask[:, None]
    found = FAMILIES["features"].forward(config, x.contiguous(), residual, weight, bias, valid, None, None, None, True)
    assert found.stats is not None
    return Rows(found.y, found.total, found.stats)


def rows_backward(
    dy: Tensor,
    s: Tensor,
    stats: Tensor,
    cols: int,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    center: bool = True,
    act: str | None = None,
    mask: Tensor | None = None,
    dsum: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(ds, dweight, dbias)."""
    config = NormConfig("layer_norm", "features", 1e-5, act, center=center)
    valid = None if mask is None else mask[:, None]
    backward = FAMILIES["features"].backward
    assert backward is not None
    found = backward(config, s.contiguous(), None, _wide(weight, s), _wide(bias, s), valid, stats, dy, dsum)
    return found.x, found.weight, found.bias


def groups_forward(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    act: str | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """GroupNorm of (N, C, ...): (y, stats); mask (N, ...)."""
    config = NormConfig("group_norm", "groups", eps, act, groups=groups)
    valid = None if mask is None else mask.unsqueeze(1)
    found = FAMILIES["groups"].forward(config, x, residual, weight, bias, valid, None, None, None, True)
    assert found.stats is not None
    return found.y, found.stats


def groups_backward(
    dy: Tensor,
    x: Tensor,
    stats: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    act: str | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dweight, dbias, dresidual)."""
    config = NormConfig("group_norm", "groups", 1e-5, act, groups=groups)
    return _backward("groups", config, dy, x, stats, weight, bias, residual, mask)


def channels_forward(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    *,
    act: str | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, bool]:
    """BatchNorm of (N, C, ...): (y, stats, whether the running averages were updated); mask (N, ...)."""
    config = NormConfig("batch_norm", "channels", eps, act, batch_statistics=training, momentum=momentum)
    valid = None if mask is None else mask.unsqueeze(1)
    found = FAMILIES["channels"].forward(
        config, x, residual, weight, bias, valid, running_mean, running_var, None, True
    )
    assert found.stats is not None
    return found.y, found.stats, bool(found.stats_updated)


def channels_backward(
    dy: Tensor,
    x: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    *,
    act: str | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dweight, dbias, dresidual)."""
    config = NormConfig("batch_norm", "channels", 1e-5, act, batch_statistics=training)
    return _backward("channels", config, dy, x, stats, weight, bias, residual, mask)


def _backward(
    family: str,
    config: NormConfig,
    dy: Tensor,
    x: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    valid = None if mask is None else mask.unsqueeze(1)
    backward = FAMILIES[family].backward
    assert backward is not None
    found = backward(config, x, residual, _wide(weight, x), _wide(bias, x), valid, stats, dy, None)
    return found.x, found.weight, found.bias, found.residual
