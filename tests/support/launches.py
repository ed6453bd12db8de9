"""What a call would do on a GPU, counted without one: launches, waits for the host, copies between devices.

A launch is an operation of ATen that computes, or a Triton kernel, which the interpreter runs. (ATen's fused norms are
one each, as they are counted for torch.nn too; some of them are two kernels on a device.) It runs on the CPU, with each
of the predicates "is this tensor on the CPU?" answering no, or on tensors of the device meta: those have no values, so
that whatever needs one, or copies one to the CPU, fails.

`CALLS` are the usual calls of norms, and `TORCHS` what torch.nn has for some of them, to be counted beside.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import normwise
from normwise.backends import devices
from normwise.backends.triton import runtime
from normwise.ops import _torch_internals, dispatch
from support.tolerances import assert_close

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
    """Counts inside a `with` block: launches by `names`, the `waits` among them, and `copies` to another device.

    `device`: "cpu", whose tensors stand for a GPU's, or "meta"; then what tensors of the CPU alone have part in is the
    host's own affair.
    """

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.device = device
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
        kinds = {t.device.type for t in _pytree.tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)}
        if kinds and self.device not in kinds:
            return result
        if _waits(name, args, kwargs or {}):
            self.waits[name] += 1
        if name not in FREE:
            self.names[name] += 1
        # Of one number the host's value goes along as an argument.
        kinds = {t.device.type for t in _pytree.tree_leaves((args, result)) if isinstance(t, Tensor) and t.dim()}
        if len(kinds) > 1 and not name.startswith("_nested_"):  # these note sizes beside a jagged tensor
            self.copies[name] += 1
            if not (kwargs or {}).get("non_blocking"):
                self.waits[name] += 1
        return result


def _waits(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        # An index of bool is a `nonzero` inside.
        return any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None
    return name in WAITS


@contextmanager
def meta_as_gpu() -> Iterator[None]:
    """Tensors of the device meta count as a GPU's, with values, those of the CPU as what they are, and a counting mode
    as nobody who looks on."""
    with _replaced(
        {
            _torch_internals.dispatch_modes_active: lambda: 0,
            dispatch.have_values: lambda *tensors: not torch.compiler.is_compiling(),
        }
    ):
        yield


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
    with _replaced(replaced):
        yield


@contextmanager
def _replaced(replaced: dict[Callable[..., Any], Callable[..., Any]]) -> Iterator[None]:
    """Functions of normwise, under whatever name a module has them at hand."""
    with ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if not name.startswith("normwise."):
                continue
            for attribute, value in list(vars(module).items()):
                if callable(value) and value in replaced:
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


N, C, L = 8, 16, 10


def some_mask() -> Tensor:
    mask = torch.rand(N, L) > 0.3
    mask[:, :2] = True
    return mask


def layers_and_arguments() -> dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Any]]]]:
    """Each usual call of a norm of (N, C, L)."""
    lengths = torch.tensor([3, 10, 2, 4, 5, 6, 7, 8])
    return {
        "batch": (lambda: normwise.BatchNorm1d(C), dict),
        "batch, 2d": (lambda: normwise.BatchNorm2d(C), dict),
        "batch, evaluation": (lambda: normwise.BatchNorm1d(C).eval(), dict),
        "batch, momentum None": (lambda: normwise.BatchNorm1d(C, momentum=None), dict),
        "batch, act and residual": (
            lambda: normwise.BatchNorm1d(C, act="relu"),
            lambda: {"residual": torch.randn(N, C, L)},
        ),
        "batch, mask": (lambda: normwise.BatchNorm1d(C), lambda: {"mask": some_mask()}),
        "batch, mask, evaluation": (lambda: normwise.BatchNorm1d(C).eval(), lambda: {"mask": some_mask()}),
        "batch, lengths": (lambda: normwise.BatchNorm1d(C), lambda: {"lengths": lengths}),
        "ghost batches": (lambda: normwise.BatchNorm1d(C, virtual_batch_size=4), dict),
        "ghost batches, mask": (lambda: normwise.BatchNorm1d(C, virtual_batch_size=4), lambda: {"mask": some_mask()}),
        "renorm": (lambda: normwise.BatchRenorm1d(C), dict),
        "sync, one rank": (lambda: normwise.SyncBatchNorm(C), dict),
        "layer": (lambda: normwise.LayerNorm(L), dict),
        "layer, mask": (lambda: normwise.LayerNorm(L), lambda: {"mask": torch.rand(N, C) > 0.3}),
        "rms": (lambda: normwise.RMSNorm(L), dict),
        "layer, scale and shift": (
            lambda: normwise.LayerNorm(L, elementwise_affine=False),
            lambda: {"scale": torch.randn(N, L), "shift": torch.randn(N, L)},
        ),
        "rms, gate": (lambda: normwise.RMSNorm(L), lambda: {"gate": torch.randn(N, C, L)}),
        "group": (lambda: normwise.GroupNorm(4, C), dict),
        "group, mask": (lambda: normwise.GroupNorm(4, C), lambda: {"mask": some_mask()}),
        "instance": (lambda: normwise.InstanceNorm1d(C), dict),
        "instance, mask": (lambda: normwise.InstanceNorm1d(C, affine=True), lambda: {"mask": some_mask()}),
        "instance, averages": (lambda: normwise.InstanceNorm1d(C, track_running_stats=True), dict),
        "instance, lengths, averages": (
            lambda: normwise.InstanceNorm1d(C, track_running_stats=True),
            lambda: {"lengths": lengths},
        ),
    }


CALLS = layers_and_arguments()


class _WithResidual(nn.Module):
    """What `act` and `residual` are of torch's own operations."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(C)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return F.relu(self.norm(x) + residual)


TORCHS: dict[str, Callable[[], nn.Module]] = {
    "batch": lambda: nn.BatchNorm1d(C),
    "batch, 2d": lambda: nn.BatchNorm2d(C),
    "batch, evaluation": lambda: nn.BatchNorm1d(C).eval(),
    "batch, momentum None": lambda: nn.BatchNorm1d(C, momentum=None),
    "batch, act and residual": _WithResidual,
    "sync, one rank": lambda: nn.BatchNorm1d(C),
    "layer": lambda: nn.LayerNorm(L),
    "rms": lambda: nn.RMSNorm(L),
    "group": lambda: nn.GroupNorm(4, C),
    "instance": lambda: nn.InstanceNorm1d(C),
    "instance, averages": lambda: nn.InstanceNorm1d(C, track_running_stats=True),
}


def input_of(call: str) -> Tensor:
    return torch.randn((N, C, 2, L // 2) if "2d" in call else (N, C, L))


def counted(call: str) -> tuple[Launches, Launches]:
    """Launches forward and backward of one of CALLS."""
    make, arguments = CALLS[call]
    return _counted(make(), input_of(call), arguments())


def counted_of_torch(call: str) -> tuple[Launches, Launches]:
    """The same of torch.nn."""
    return _counted(TORCHS[call](), input_of(call), CALLS[call][1]())


def _counted(layer: nn.Module, x: Tensor, arguments: dict[str, Any]) -> tuple[Launches, Launches]:
    x.requires_grad_()
    return forward_and_backward(lambda: layer(x, **arguments))


def check_values(call: str) -> None:
    """One of CALLS as on a GPU and on the reference: outputs, gradients and running averages agree."""
    make, arguments = CALLS[call]
    given, x = arguments(), input_of(call)
    grad = torch.randn_like(x)

    def run() -> list[Tensor]:
        torch.manual_seed(0)
        layer = make()
        with torch.no_grad():
            for p in layer.parameters():
                p.add_(torch.rand_like(p))
        at = x.clone().requires_grad_()
        for _ in range(2):  # the second one finds averages that have moved
            y = layer(at, **given)
        y.backward(grad)
        grads = [p.grad for p in layer.parameters() if p.grad is not None]
        assert at.grad is not None
        return [y.detach(), at.grad, *grads, *layer.buffers()]

    with normwise.backend("reference"):
        expected = run()
    with as_on_gpu():
        found = run()
    assert len(found) == len(expected)
    for ours, truth in zip(found, expected, strict=True):
        scale = float(truth.detach().abs().max()) + 1
        assert_close(ours, truth, kind="composed", dtype=torch.float32, count=N * L, scale=scale)


def check_skipped(masked: bool, momentum: float | None, more: int) -> None:
    """Batches that are not finite, `more` than two of them, move nothing and are counted, and eval() warns of them."""
    layer = normwise.BatchNorm1d(C, momentum=momentum)
    given = {"mask": torch.ones(N, L, dtype=torch.bool)} if masked else {}
    bad = torch.randn(N, C, L)
    bad[0, 3, 1] = float("inf")
    with as_on_gpu():
        layer(torch.randn(N, C, L), **given)
        before = [b.clone() for b in layer.buffers()]
        layer(bad, **given)
        layer(bad * float("nan"), **given)
        assert all(torch.equal(b, a) for b, a in zip(layer.buffers(), before, strict=True))
        assert layer.num_batches_skipped == 2
        for _ in range(more):
            layer(bad, **given)
        assert layer.num_batches_skipped == 2 + more
        with pytest.warns(UserWarning, match="skipped an update"):
            layer.eval()
