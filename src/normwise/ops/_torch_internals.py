"""Every private name of torch that normwise uses, and what it is used for.

tests/ops/test_torch_internals.py tests for each what breaks without it.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor
from torch.autograd import forward_ad

from normwise.backends._torch_internals import constant_while_compiling
from normwise.backends.devices import on_cpu

__all__ = [
    "any_autocast_enabled",
    "compiler_loaded",
    "constant_while_compiling",
    "current_graph_task_id",
    "dispatch_modes_active",
    "forward_ad_active",
    "is_batchedtensor",
    "is_fake",
    "is_jit_tracing",
    "is_plain_elsewhere",
    "readable",
    "readable_on_gpu",
    "transforms_active",
    "without_fake_tensors",
]


# Inside torch.func's vmap, grad and the like: no value of a tensor may be looked at.
transforms_active = torch._C._are_functorch_transforms_active

# How many TorchDispatchModes (make_fx, FakeTensorMode, counters) are active: they see ATen's operations only.
dispatch_modes_active = torch._C._len_torch_dispatch_stack

# torch.jit.trace records ATen's operations only.
is_jit_tracing = torch._C._is_tracing

# Whether some device type runs under autocast: torch.nn's recurrent layers then take any dtype.
any_autocast_enabled = torch._C._is_any_autocast_enabled

# The number of the running backward, -1 outside of one: activation checkpointing runs forwards inside of it.
current_graph_task_id = torch._C._current_graph_task_id


# What torch's dispatcher knows of a dense tensor on the CPU. Whatever else it knows of a tensor (a wrapper subclass, a
# functional or batched tensor, a negative or conjugate bit, another layout or device, zeros without memory) means that
# the elements are not those that lie at `data_ptr()`.
_dispatch_keys = torch._C._dispatch_keys
_ordinary = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
for _key in ("AutogradCPU", "AutocastCPU", "ADInplaceOrView"):
    _ordinary |= torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, _key))
_is_ordinary = _ordinary.__eq__  # half the time of the bits
_FOREIGN = ~_ordinary.raw_repr()
_TENSORS = (Tensor, torch.nn.Parameter)

# The same of a dense tensor on a GPU.
_ordinary_on_gpu = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
for _key in ("AutogradCUDA", "AutocastCUDA", "ADInplaceOrView"):
    _ordinary_on_gpu |= torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, _key))
_FOREIGN_ON_GPU = ~_ordinary_on_gpu.raw_repr()


def readable(*tensors: Tensor | None) -> bool:
    """Whether C may read each of these where its `data_ptr()` points: the one condition for a tensor to go to a kernel.

    That is a dense tensor on the CPU of no subclass, with memory. None is skipped.
    """
    for t in tensors:
        if t is not None and (
            type(t) not in _TENSORS
            or (not _is_ordinary(keys := _dispatch_keys(t)) and keys.raw_repr() & _FOREIGN)
            or (not t.data_ptr() and t.numel() > 0)
        ):
            return False
    return True


def is_plain_elsewhere(t: Tensor) -> bool:
    """A dense tensor of no subclass on another device than the CPU, whose memory that device's kernels may read."""
    return type(t) in _TENSORS and not on_cpu(t) and t.layout is torch.strided and not t.is_neg() and not t.is_conj()


def readable_on_gpu(*tensors: Tensor | None) -> bool:
    """`readable` by a kernel on a GPU: a dense tensor there of no subclass, with memory. None is skipped."""
    return all(
        t is None
        or (
            type(t) in _TENSORS
            and not _dispatch_keys(t).raw_repr() & _FOREIGN_ON_GPU
            and (t.data_ptr() != 0 or t.numel() == 0)
        )
        for t in tensors
    )


def forward_ad_active() -> bool:
    """Inside torch.autograd.forward_ad.dual_level."""
    return forward_ad._current_level >= 0


def is_fake(t: Tensor) -> bool:
    """A FakeTensor, which has a device and a shape, but no values."""
    if type(t) is Tensor:
        return False
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(t, FakeTensor)


def compiler_loaded() -> bool:
    """Whether the compiler was loaded, which takes a second: before, nothing can have been compiled."""
    return "torch._dynamo" in sys.modules


def without_fake_tensors() -> AbstractContextManager[Any]:
    """Inside, new tensors are real ones even while torch.compile or torch.export traces with FakeTensors."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    return unset_fake_temporarily()


# What takes a node's place in an export to a format that has no such node.
register_decomposition = torch._decomp.register_decomposition
