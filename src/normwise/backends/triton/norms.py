"""Norms by the Triton kernels: what they take, and the kernels of each family, imported when the first tensor comes."""

from __future__ import annotations

from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from normwise.backends.gains import gain_obstacle
from normwise.backends.protocol import Gate, NormConfig, NormFamily, NormGradients, NormRequest, NormResult
from normwise.backends.triton import runtime
from normwise.backends.triton.running_stats import DTYPES, averages_obstacle

# A row is held in registers whole: 16 elements a thread of the largest block of threads.
LONGEST_ROW = 1 << 14
# With a gain of some rows, or a gate: the backward of a longer one would spill most of its registers.
LONGEST_MODULATED_ROW = 1 << 13
_KERNELS = "the Triton kernels"


def supports(request: NormRequest) -> str | None:
    """What the kernels cannot do; what is missing on this machine is named first."""
    config, x, residual, weight, bias, _, running_mean, running_var, _ = request
    reason = runtime.obstacle(x)
    if reason is not None:
        return reason
    for name, t in (("an input", x), ("a gain", weight), ("a bias", bias)):
        if t is not None and t.dtype not in DTYPES:
            return f"the Triton kernels take float32, bfloat16, float16 and float64, not {name} of {t.dtype}"
    if residual is not None and residual.dtype is not x.dtype:
        return f"the Triton kernels do not mix an input of {x.dtype} with a residual of {residual.dtype}"
    if config.family == "features":
        reason = _length_obstacle(config, x, LONGEST_ROW, "")
        if reason is None and any(t is not None and t.dim() != config.axes for t in (weight, bias)):
            reason = gain_obstacle(_KERNELS, config, x, weight, bias)
            reason = reason or _length_obstacle(config, x, LONGEST_MODULATED_ROW, " with a gain of some rows")
        if reason is not None:
            return reason
    elif any(t is not None and t.dim() > 1 for t in (weight, bias)):
        return f"{_KERNELS} take a gain and bias of all samples here"
    if config.family != "channels" and x.is_cuda and torch.is_autocast_enabled("cuda") and x.dtype.itemsize < 4:
        return "under autocast this norm computes and returns float32, which the Triton kernels do not"
    if running_mean is not None and running_var is not None and config.family == "channels":
        reason = averages_obstacle(running_mean, running_var)
        if reason is not None:
            return reason
    momentum = config.momentum if isinstance(config.momentum, Tensor) else None
    for t in (*request.tensors, momentum):
        if t is not None and t.device != x.device:
            return f"the Triton kernels take tensors on one device, not on {x.device} and {t.device}"
    return None


def supports_gate(config: NormConfig, x: Tensor, gate: Gate) -> str | None:
    """What the kernels cannot do with a gate of a request that they support without it."""
    if gate.values.dtype is not x.dtype:
        return f"{_KERNELS} do not mix an input of {x.dtype} with a gate of {gate.values.dtype}"
    if gate.values.device != x.device:
        return f"{_KERNELS} take tensors on one device, not on {x.device} and {gate.values.device}"
    return _length_obstacle(config, x, LONGEST_MODULATED_ROW, " with a gate")


def _length_obstacle(config: NormConfig, x: Tensor, longest: int, of: str) -> str | None:
    cols = prod(x.shape[x.dim() - config.axes :])
    return f"{_KERNELS} hold a row whole, and take up to {longest} elements{of}, not {cols}" if cols > longest else None


_OF_REQUEST = len(NormRequest._fields)


def _features_forward(*request: Any) -> NormResult:
    from normwise.backends.triton import rows

    return rows.forward(NormRequest(*request[:_OF_REQUEST]), *request[_OF_REQUEST:])


def _tiles_forward(family: str, *request: Any) -> NormResult:
    from normwise.backends.triton import tiles

    forward = {"groups": tiles.groups_forward, "channels": tiles.channels_forward}[family]
    return forward(NormRequest(*request[:-1]), request[-1])


def _features_backward(*saved: Any) -> NormGradients:
    from normwise.backends.triton import rows

    return rows.backward(*saved)


def _tiles_backward(*saved: Any) -> NormGradients:
    from normwise.backends.triton import tiles

    return tiles.backward(*saved)


FAMILIES = {
    "features": NormFamily(_features_forward, _features_backward, supports_gate),
    "groups": NormFamily(partial(_tiles_forward, "groups"), _tiles_backward),
    "channels": NormFamily(partial(_tiles_forward, "channels"), _tiles_backward),
}
