"""What a call would do on a GPU, counted without one: launches, waits for the host, copies between devices.

A launch is an operation of ATen that computes, or a Triton kernel, which the interpreter runs. (ATen's fused norms are
one each, as they are counted for torch.nn too; some of them are two kernels on a device.) `launches` runs on the CPU, with each of the predicates "is this tensor on
the CPU?" answering no. `on_meta` runs on tensors of the device meta instead: those have no values, so that whatever
needs one, or copies one to the CPU, fails.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from normwise.backends import devices
from normwise.backends.triton import runtime
from normwise.ops import _torch_internals, dispatch

# Operations that start nothing: views, memory without content, and what only reads sizes or dtypes.
_FREE = """
_reshape_alias _unsafe_view alias as_strided chunk detach diagonal empty empty_like empty_permuted empty_strided expand
flatten lift_fresh movedim narrow new_empty new_empty_strided permute promote_types resize_ select set_ slice split
split_with_sizes squeeze t transpose unbind unflatten unfold unsqueeze view view_as
"""
FREE = frozenset(_FREE.split())
# Operations whose result is a value or a size that the host needs: it waits until the device has come to them.
_WAITS = """
_local_scalar_dense _unique2 bincount equal is_nonzero item masked_select nonzero repeat_interleave unique_dim
"""
WAITS = frozenset(_WAITS.split())


class Launches(TorchDispatchMode):
    """Counts inside a `with` block: launches by `names`, the `waits` among them, and `copies` to another device."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()
        self._patches = ExitStack()

    def __enter__(self) -> Launches:
        if runtime.interpreted() and runtime.missing() is None:
            from triton.runtime.interpreter import GridExecutor

            run = GridExecutor.__call__

            def launch(executor: Any, *args: Any, **kwargs: Any) -> Any:
                self.names[f"triton {executor.fn.__name__}"] += 1
                with _disable_current_modes():  # what the interpreter does with the tensors is not the call's
                    return run(executor, *args, **kwargs)

            self._patches.enter_context(mock.patch.object(GridExecutor, "__call__", launch))
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._patches.close()

    @property
    def count(self) -> int:
        return sum(self.names.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        result = func(*args, **(kwargs or {}))
        if _waits(name, args, kwargs or {}):
            self.waits[name] += 1
        if name not in FREE:
            self.names[name] += 1
        # Of one number the host's value goes along as an argument.
        kinds = {t.device.type for t in _pytree.tree_leaves((args, result)) if isinstance(t, Tensor) and t.dim()}
        if len(kinds) > 1:
            self.copies[name] += 1
        return result


def _waits(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        # An index of bool is a `nonzero` inside.
        return any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None
    return name in WAITS


@contextmanager
def as_on_gpu() -> Iterator[None]:
    """Every tensor counts as one of a GPU, with values, and a counting mode as nobody who looks on. Where Triton's
    interpreter is there, it counts as Triton on that GPU."""
    plain = _torch_internals.readable
    replaced: dict[Callable[..., Any], Callable[..., Any]] = {
        devices.on_cpu: lambda t: False,
        _torch_internals.readable: lambda *tensors: all(t is None for t in tensors),
        _torch_internals.readable_on_gpu: plain,
        _torch_internals.dispatch_modes_active: lambda: 0,
        dispatch.have_values: lambda *tensors: not torch.compiler.is_compiling() and not dispatch.transforms_active(),
    }
    with ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if not name.startswith("normwise."):
                continue
            for attribute, value in list(vars(module).items()):
                if callable(value) and value in replaced:  # under whatever name a module has it at hand
                    stack.enter_context(mock.patch.object(module, attribute, replaced[value]))
        yield


def forward_and_backward(function: Callable[[], Tensor]) -> tuple[Launches, Launches]:
    """Those of a forward as on a GPU, in its second call, since what a first one prepares does not count; and of the
    backward behind it, whose gradient from above is at hand."""
    with as_on_gpu():
        grad = torch.ones_like(function())
        with Launches() as forward:
            y = function()
        with Launches() as backward:
            y.backward(grad)
    return forward, backward
