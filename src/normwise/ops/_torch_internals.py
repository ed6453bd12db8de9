"""Every private name of torch that normwise uses, and what it is used for.

tests/ops/test_torch_internals.py says for each what breaks if it goes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor, is_legacy_batchedtensor
from torch.autograd import forward_ad

# Inside torch.func's vmap, grad and the like: no value of a tensor may be looked at.
transforms_active = torch._C._are_functorch_transforms_active

# How many TorchDispatchModes (make_fx, FakeTensorMode, counters) look on: they see ATen's operations only.
dispatch_modes_active = torch._C._len_torch_dispatch_stack

# torch.jit.trace records ATen's operations only.
is_jit_tracing = torch._C._is_tracing

# The number of the running backward, -1 outside of one: activation checkpointing runs forwards inside of it.
current_graph_task_id = torch._C._current_graph_task_id


def forward_ad_active() -> bool:
    """Inside torch.autograd.forward_ad.dual_level."""
    return forward_ad._current_level >= 0


def is_fake(t: Tensor) -> bool:
    """A FakeTensor, which has a device and no memory."""
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(t, FakeTensor)


__all__ = [
    "current_graph_task_id",
    "dispatch_modes_active",
    "forward_ad_active",
    "is_fake",
    "is_functorch_wrapped_tensor",
    "is_jit_tracing",
    "is_legacy_batchedtensor",
    "transforms_active",
]
