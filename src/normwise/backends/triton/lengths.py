"""A mask of lengths in one launch; the kernel is imported with the first tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from normwise.backends.protocol import LengthsRequest
from normwise.backends.triton import runtime

DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
# Steps of one program at most.
BLOCK = 1024


def supports(request: LengthsRequest) -> str | None:
    """What the kernel cannot do; what is missing on this machine is named first."""
    reason = runtime.obstacle(request.lengths)
    if reason is None and request.lengths.dtype not in DTYPES:
        reason = (
            f"the Triton kernels take lengths as integers of up to 64 bits with a sign, not {request.lengths.dtype}"
        )
    return reason


def mask(request: LengthsRequest) -> Tensor:
    """(samples, steps) bool: the first `lengths` steps of each sample."""
    lengths, steps = request
    valid = torch.empty(len(lengths), steps, dtype=torch.bool, device=lengths.device)
    if valid.numel():
        from normwise.backends.triton.kernels.lengths import valid_steps

        block = min(runtime.power_of_2(steps), BLOCK)
        with runtime.on_device_of(lengths):
            valid_steps[(len(lengths), runtime.blocks(steps, block))](
                lengths, valid.view(torch.uint8), lengths.stride(0), steps, BLOCK=block
            )
    return valid
