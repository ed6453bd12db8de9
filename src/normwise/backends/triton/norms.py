"""Norms by the Triton kernels: what they take, and the kernels of each family."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from normwise.backends.protocol import NormFamily, NormRequest
from normwise.backends.triton import rows, runtime, settings, tiles

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


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
        cols = prod(x.shape[x.dim() - config.axes :])
        if cols > settings.LONGEST_ROW:
            return f"the Triton kernels hold a row whole, and take up to {settings.LONGEST_ROW} elements, not {cols}"
    if config.family != "channels" and x.is_cuda and torch.is_autocast_enabled("cuda") and x.dtype.itemsize < 4:
        return "under autocast this norm computes and returns float32, which the Triton kernels do not"
    if running_mean is not None and running_var is not None and config.family == "channels":
        for average in (running_mean, running_var):
            if average.dtype not in DTYPES or not average.is_contiguous():
                return "the Triton kernels keep contiguous running averages of a dtype that they take as input"
    momentum = config.momentum if isinstance(config.momentum, Tensor) else None
    for t in (*request.tensors, momentum):
        if t is not None and t.device != x.device:
            return f"the Triton kernels take tensors on one device, not on {x.device} and {t.device}"
    return None


FAMILIES = {
    "features": NormFamily(rows.forward, rows.backward),
    "groups": NormFamily(tiles.groups_forward, tiles.backward),
    "channels": NormFamily(tiles.channels_forward, tiles.backward),
}
