"""What a fused forward calls: several layers in one pass where that is possible, else one after the other.

So it is right whatever becomes of the layers in it: hooks that are put on one, another activation in the place of the
one that was there, a norm that `fold`, `convert` or torch.nn.SyncBatchNorm.convert_sync_batchnorm replaced.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

import normwise.nn as ours
from normwise.backends.activations import ACTIVATIONS
from normwise.surgery.forwards import is_bound
from normwise.surgery.fusing.activations import is_hooked, named

WITH_RESIDUAL = (
    ours.BatchNorm1d,
    ours.BatchNorm2d,
    ours.BatchNorm3d,
    ours.BatchRenorm1d,
    ours.BatchRenorm2d,
    ours.BatchRenorm3d,
    ours.SyncBatchNorm,
    ours.FrozenBatchNorm1d,
    ours.FrozenBatchNorm2d,
    ours.FrozenBatchNorm3d,
    ours.GroupNorm,
    ours.InstanceNorm1d,
    ours.InstanceNorm2d,
    ours.InstanceNorm3d,
)
WITH_ADD = (ours.LayerNorm, ours.RMSNorm)


def norm_then(
    norm: nn.Module, x: Any, act: nn.Module | str | None, residual: Any = None, into: int | None = None
) -> Any:
    """act(norm(x) + residual), with `act` a module, a name of `ACTIVATIONS` or None.

    Args:
        into: which of the two the sum was written into, 0 or 1, whose dtype it then has; None: something new.
    """
    name = named(act) if isinstance(act, nn.Module) else act
    if (act is None or name is not None) and _takes(norm, WITH_ADD if residual is None else (), x):
        if residual is None:
            return norm(x, act=name)
        if _alike(residual, x) and not (isinstance(norm, nn.GroupNorm) and _autocasts(x)):
            return norm(x, residual=residual, act=name)
    y = norm(x)
    return _activated(y if residual is None else _sum(y, residual, into), act)


def add_then_norm(
    norm: nn.Module, a: Any, b: Any, act: nn.Module | str | None = None, into: int | None = None
) -> tuple[Any, Any]:
    """(act(norm(a + b)), a + b), with `act` and `into` as in `norm_then`."""
    name = named(act) if isinstance(act, nn.Module) else act
    if (
        (act is None or name is not None)
        and type(norm) in WITH_ADD
        and _takes(norm, WITH_ADD, a)
        and _alike(a, b)
        and not _autocasts(a)
    ):
        return norm(a, add=b, act=name)  # type: ignore[no-any-return]
    total = _sum(a, b, into)
    return _activated(norm(total), act), total


def _sum(a: Any, b: Any, into: int | None) -> Any:
    return a + b if into is None else iadd(b, a) if into else iadd(a, b)


def _takes(norm: nn.Module, more: tuple[type[nn.Module], ...], x: Any) -> bool:
    kind = type(norm)
    return (
        (kind in WITH_RESIDUAL or kind in more)
        and norm.act is None
        and not is_hooked(norm)
        and not is_bound(norm)
        and not isinstance(x, Proxy)
    )


def _alike(a: Any, b: Any) -> bool:
    return (
        isinstance(a, Tensor)
        and isinstance(b, Tensor)
        and a.shape == b.shape
        and a.dtype == b.dtype
        and a.device == b.device
    )


def _autocasts(x: Tensor) -> bool:
    """Whether autocast takes a norm's result to float32, and what is added before or behind it stays as it is."""
    kind = x.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def _activated(y: Any, act: nn.Module | str | None) -> Any:
    if act is None:
        return y
    return ACTIVATIONS[act](y) if isinstance(act, str) else act(y)


# What `a += b` and its like do, as functions: a graph of torch.fx has the operators of Python, which are not told apart
# from those that make something new.


def iadd(a: Any, b: Any) -> Any:
    """a += b."""
    a += b
    return a


def isub(a: Any, b: Any) -> Any:
    """a -= b."""
    a -= b
    return a


def imul(a: Any, b: Any) -> Any:
    """a *= b."""
    a *= b
    return a


def itruediv(a: Any, b: Any) -> Any:
    """a /= b."""
    a /= b
    return a


IN_PLACE = (iadd, isub, imul, itruediv)
