"""The C++ norm kernels as functions of tensors: requests made out of arguments."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from normwise.backends.cpu.memory import parameter_dtype
from normwise.backends.cpu.norms import FAMILIES
from normwise.backends.protocol import Gate, NormConfig


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
    gate: Gate | None = None,
) -> Rows:
    """LayerNorm, or RMSNorm if not `center`, of the last axis of x (rows, cols); mask (rows,); gain and bias (cols,),
    or (groups, 1, cols) of groups of rows."""
    assert x.shape[1] == cols
    config = NormConfig("layer_norm", "features", eps, act, center=center)
    x, residual, mask, gate = _grouped(x.contiguous(), residual, mask, gate, weight)
    found = FAMILIES["features"].forward(config, x, residual, weight, bias, mask, None, None, None, True, gate)
    assert found.stats is not None
    return Rows(found.y.view(-1, cols), found.total.view(-1, cols), found.stats)


def _grouped(
    x: Tensor, residual: Tensor | None, mask: Tensor | None, gate: Gate | None, weight: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None, Gate | None]:
    """(rows, cols), and what goes with it, with an axis for the groups that have a gain each."""
    mask = None if mask is None else mask[:, None]
    if weight is None or weight.dim() == 1:
        return x, residual, mask, gate
    shape = (len(weight), -1, x.shape[1])
    gate = None if gate is None else gate._replace(values=gate.values.view(shape))
    mask = None if mask is None else mask.view(*shape[:2], 1)
    return x.view(shape), None if residual is None else residual.view(shape), mask, gate


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
    gate: Gate | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(ds, dweight, dbias, gradient of the gate)."""
    config = NormConfig("layer_norm", "features", 1e-5, act, center=center)
    backward = FAMILIES["features"].backward
    assert backward is not None
    s, dsum, mask, gate = _grouped(s.contiguous(), dsum, mask, gate, weight)
    dy = dy.view(s.shape)
    found = backward(config, s, None, _wide(weight, s), _wide(bias, s), mask, stats, dy, dsum, gate)
    dgate = None if found.gate is None else found.gate.view(-1, cols)
    return found.x.view(-1, cols), found.weight, found.bias, dgate


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
