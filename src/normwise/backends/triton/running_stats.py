"""Running averages, moved in one launch, of a BatchNorm guarded; the kernels are imported with the first tensor."""

from __future__ import annotations

from ctypes import c_float

import torch
from torch import Tensor

from normwise.backends.protocol import RunningStatsRequest
from normwise.backends.triton import runtime

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def supports(request: RunningStatsRequest) -> str | None:
    """What the kernel cannot do; what is missing on this machine is named first."""
    mean = request.running_mean
    reason = runtime.obstacle(mean)
    if reason is not None:
        return reason
    reason = averages_obstacle(mean, request.running_var)
    if reason is not None:
        return reason
    counter = request.num_batches_tracked
    if counter is not None and counter.dtype is not torch.int64:
        return f"the Triton kernels count batches in int64, not {counter.dtype}"
    for t in request.tensors:
        if t is not None and t.device != mean.device:
            return f"the Triton kernels take tensors on one device, not on {mean.device} and {t.device}"
    return None


def averages_obstacle(*averages: Tensor) -> str | None:
    """What keeps the kernels from these running averages, or None."""
    if all(t.dtype in DTYPES and t.is_contiguous() for t in averages):
        return None
    return "the Triton kernels keep contiguous running averages of a dtype that they take as input"


def update(request: RunningStatsRequest) -> Tensor:
    """Whether the running averages were updated, as a 0-d tensor: a look at it would wait for the device."""
    from normwise.backends.triton.kernels.running_stats import update_running

    running_mean, running_var, counter, momentum, mean, var, count, rstd, eps = request
    assert mean is not None
    channels = running_mean.numel()
    counts = count.expand(channels) if isinstance(count, Tensor) else None
    updated = torch.empty((), dtype=torch.bool, device=running_mean.device)
    _tell_of_change(running_mean, running_var, counter)
    with runtime.on_device_of(running_mean):
        update_running[(1,)](
            mean.contiguous(),
            (rstd if var is None else var).contiguous(),  # type: ignore[union-attr]
            counts,
            running_mean,
            running_var,
            counter,
            momentum if isinstance(momentum, Tensor) else None,
            updated.view(torch.uint8),
            channels,
            0 if isinstance(count, Tensor) else count,
            0 if counts is None else counts.stride(0),
            *_in_two_floats(momentum),
            EPS=eps if var is None else None,
            CUMULATIVE=momentum is None,
            BLOCK=min(runtime.power_of_2(channels), 1024),
        )
    return updated


def update_over_samples(request: RunningStatsRequest) -> None:
    """By moments (N, C) of each sample's own."""
    from normwise.backends.triton.kernels.running_stats import update_running_over_samples

    running_mean, running_var, _, momentum, mean, var, count, *_ = request
    assert mean is not None
    assert var is not None
    assert isinstance(count, Tensor)
    samples, channels = mean.shape
    block = min(runtime.power_of_2(channels), 128)
    _tell_of_change(running_mean, running_var)
    with runtime.on_device_of(running_mean):
        update_running_over_samples[(-(-channels // block),)](
            mean.contiguous(),
            var.contiguous(),
            count,
            running_mean,
            running_var,
            momentum if isinstance(momentum, Tensor) else None,
            samples,
            channels,
            *count.stride(),
            *_in_two_floats(momentum),
            BLOCK=block,
        )


def _tell_of_change(*changed: Tensor | None) -> None:
    """For what a graph has saved of them, as torch's own operations do it."""
    torch.autograd.graph.increment_version([t for t in changed if t is not None])


def _in_two_floats(momentum: float | Tensor | None) -> tuple[float, float]:
    """A float reaches a kernel in float32: float64 averages want the rest as well."""
    exact = 0.0 if momentum is None or isinstance(momentum, Tensor) else float(momentum)
    rounded = c_float(exact).value
    return rounded, exact - rounded
