"""Which backend runs a call: the only place that decides, once a call.

- `cpu`: our C++ kernels.
- `aten`: torch's own kernels, where they do the same job as well.
- `triton`: our kernels for GPUs; by default only where the alternative is the reference or dozens of ATen's launches.
- `reference`: plain PyTorch operations; always works.

`with normwise.backend("reference"):` or the environment variable NORMWISE_BACKEND forces one for the whole process;
a forced backend never falls back but raises `BackendError` with the reason. Where only a missing library keeps the C++
kernels from a call, it warns once with `KernelWarning`; NORMWISE_KERNEL_WARNING=off silences that.
"""

import importlib
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normwise.backends.aten import rnn as aten_rnn
from normwise.backends.aten.backend import BACKEND as ATEN
from normwise.backends.aten.norms import MEAN_TO_DEVIATION_LIMIT
from normwise.backends.cpu import library
from normwise.backends.cpu.backend import BACKEND as CPU
from normwise.backends.devices import on_cpu
from normwise.backends.protocol import (
    Backend,
    Gate,
    LengthsRequest,
    NormFamily,
    NormRequest,
    Operation,
    RecurrenceRequest,
    RunningStatsRequest,
)
from normwise.backends.reference.backend import BACKEND as REFERENCE
from normwise.backends.triton import runtime
from normwise.backends.triton.backend import BACKEND as TRITON
from normwise.ops._torch_internals import (
    constant_while_compiling,
    dispatch_modes_active,
    forward_ad_active,
    is_fake,
    is_jit_tracing,
    readable,
    readable_on_gpu,
    transforms_active,
)
from normwise.words import did_you_mean

BACKENDS = {backend.name: backend for backend in (CPU, TRITON, ATEN, REFERENCE)}

for _facts_of_the_machine in (library.missing, runtime.missing, runtime.interpreted):
    constant_while_compiling(_facts_of_the_machine)
_is_compiling = torch.compiler.is_compiling


class BackendError(RuntimeError):
    """A forced backend cannot run the call."""


class KernelWarning(UserWarning):
    """The compiled kernels would have run a call, but cannot be loaded: slower operations did."""


class Resolved(NamedTuple):
    """The backend of a call and why it was taken."""

    backend: Backend
    reason: str


class _Forced:
    """The forced backend. An object's attribute, because torch.compile can read and guard it: a ContextVar it cannot
    read, and 2.11 does not guard a class's attribute."""

    name: str | None = None


_forced = _Forced()
_KERNEL = Resolved(CPU, "the C++ kernel")
_TRITON = Resolved(TRITON, "the Triton kernel, where ATen's would not do")
_TRITON_MASKED = Resolved(TRITON, "the Triton kernels, four launches, where with a mask ATen's operations are dozens")
_TRITON_RECURRENCE = Resolved(TRITON, "the Triton kernel, one launch and one product a step")
_SMALL_LAYER_NORM = Resolved(ATEN, "ATen's LayerNorm is faster on few numbers")
_SMALL_TORCH_LAYER = Resolved(ATEN, "torch's own kernel is faster where there is no norm and little to multiply")
# A kernel adds up in another order, by which 1 to 7 of a million bfloat16 results are the other neighbour (of float32
# results a third would be, and nobody counts on these). It takes a fifth of the time: whoever wants that forces it.
_AS_WRITTEN = Resolved(ATEN, "the operations of the models that its options are from, for the same bits")

# Multiplications in a GRU or RNN up to which one call of torch's own multi-layer kernel takes less time than what
# Python does around ours: at 2^12 an RNN by ours takes 1.3 of its time without a gradient and 0.9 with one, a GRU at
# 2^13.6 0.8 and 0.5. An LSTM by ours takes less at any size (0.7 to 0.95 from 2^9 to 2^25).
FEW_PRODUCTS = 1 << 13


# Elements, and elements of a row, up to which ATen's LayerNorm, whose gradient needs no Python, takes less time than
# our kernel, a look at the values included: forward and backward take 1.4 to 1.7 times as long as torch.nn's with
# ATen's and 1.7 to 2.3 times with ours, from (32, 128) to (128, 512); at (1024, 64) both take 1.7 on two threads, 1.4
# and 1.7 on one. With ReLU behind it, to (32, 512), 1.4 and 1.6 times as long as torch.nn's two layers; with GELU both
# 1.3; of more numbers ours takes less, and half the memory.
FEW_ELEMENTS, FEW_ELEMENTS_TO_ACTIVATE, SHORT_ROW = 1 << 16, 1 << 14, 1 << 11


def _other_for_norm(request: NormRequest, known_readable: bool) -> Resolved | None:
    """Triton with a mask on a GPU, where ATen has a composition of dozens of operations. ATen for a norm `as_written`
    of half precision, and for LayerNorm of few float32 numbers, with a gradient and nothing but an activation beyond
    torch.nn's, whose values ATen keeps the digits of."""
    config, x, residual, weight, bias, mask, *_ = request
    if mask is not None and not on_cpu(x) and is_masked_batch(request):
        return _TRITON_MASKED if _triton_obstacle(request, "norm") is None else None
    if config.as_written and x.dtype in (torch.bfloat16, torch.float16):
        return _AS_WRITTEN if ATEN.norm.supports(request) is None else None
    is_small_layer_norm = (
        torch.is_grad_enabled()
        and known_readable
        and config.family == "features"
        and config.center
        and 0 < x.numel() <= (FEW_ELEMENTS if config.act is None else FEW_ELEMENTS_TO_ACTIVATE)
        and residual is None
        and mask is None
        and x.dtype is torch.float32
        and (weight is None or (weight.dtype is torch.float32 and weight.dim() == config.axes))
        and (bias is None or (bias.dtype is torch.float32 and bias.dim() == config.axes))
        and (x.requires_grad or any(t is not None and t.requires_grad for t in (weight, bias)))
        and x.is_contiguous()
        and (cols := prod(x.shape[x.dim() - config.axes :])) <= SHORT_ROW
        and library.missing() is None
        and not is_traced_or_transformed()
        and library.rows_near_zero(x, cols, config.eps, MEAN_TO_DEVIATION_LIMIT)
    )
    return _SMALL_LAYER_NORM if is_small_layer_norm else None


def _other_for_recurrence(request: RecurrenceRequest, known_readable: bool) -> Resolved | None:
    """Triton for a layer with a norm on a GPU, where an eager loop of ATen's launches a dozen kernels a step. torch's
    own layer where there is no norm and few products; of any size a cell, and while compiling, since torch.compile
    leaves torch.nn's layers as they are."""
    if not request.config.is_torch_layer:
        taken = not on_cpu(request.x) and _triton_obstacle(request, "recurrence") is None
        return _TRITON_RECURRENCE if taken else None
    if is_transforming() or aten_rnn.supports_stack(request) is not None:
        return None
    if request.is_cell or _is_compiling():
        return _SMALL_TORCH_LAYER
    if request.config.cell == "lstm":
        return None
    rows = request.x.numel() // max(request.x.shape[-1], 1)
    fewest = min([w.weight_ih.numel() + w.weight_hh.numel() for w in request.weights])
    return _SMALL_TORCH_LAYER if rows * fewest < FEW_PRODUCTS else None


# Which backend is taken instead of the one that the order below comes to first: by the operation.
RATHER: dict[str, Callable[[Any, bool], Resolved | None]] = {
    "norm": _other_for_norm,
    "recurrence": _other_for_recurrence,
}


def force(name: str | None) -> None:
    """Force backend `name` from now on; None lets `resolve` decide again. ValueError names the known backends."""
    if name is not None and name not in BACKENDS:
        hint = did_you_mean(name, BACKENDS, {"torch": "aten"})
        raise ValueError(f"unknown backend {name!r}: expected one of {', '.join(map(repr, BACKENDS))}{hint}")
    if name == TRITON.name:  # a compiler that traces a call must find its norms' node there
        importlib.import_module("normwise.ops.custom_op.kernel_norm")
    _forced.name = name


def forced() -> str | None:
    """The forced backend, or None."""
    return _forced.name


@contextmanager
def backend(name: str | None) -> Iterator[None]:
    """Force a backend inside a `with` block, in all threads; None lifts an outer block's choice."""
    before = _forced.name
    force(name)
    try:
        yield
    finally:
        _forced.name = before


def resolve(request: Any, operation: str = "norm", known_readable: bool = False) -> Resolved:
    """The backend for a request of an `operation`, "norm" or "recurrence", and the reason.

    `known_readable`: somebody has found all of its tensors `readable`, which takes long beside a small kernel.

    Raises:
        BackendError: a forced backend cannot run it.
    """
    if _forced.name is not None:
        return _resolve_forced(request, operation)
    other = RATHER[operation](request, known_readable)
    if other is not None:
        return other
    reason = _kernel_obstacle(request, operation, known_readable)
    if reason is None:
        return _KERNEL
    if not _is_compiling():
        if transforms_active():
            return Resolved(REFERENCE, "inside a torch.func transform")
        if reason is CPU.missing() and not library.turned_off():
            _warn_once(reason)
    aten = getattr(ATEN, operation)
    obstacle = _aten_obstacle(request, operation)
    if obstacle is None:
        obstacle = aten.shortcoming(request, may_look_at_values(request.x))
    if obstacle is None:
        return Resolved(ATEN, "ATen's kernel does the same job")
    if _triton_obstacle(request, operation) is None:
        return _TRITON
    return Resolved(REFERENCE, obstacle)


def modulated_kernel(request: NormRequest, gate: Gate | None, known_readable: bool) -> NormFamily | None:
    """The kernels for a norm with a gain and bias by sample or position, or with a gate, chosen or forced; None where
    the norm runs bare, on the backend that `resolve` names, and torch's operations follow.

    Of no size are these the quicker ones on the CPU: from 1 to 64 rows of 64 the kernel takes 0.75 to 0.8 of their time
    without a gradient, with one 0.97 to 1.05, with a gate and a gradient 0.75; at (4, 64, 384) 0.55, 0.55 and 0.4.
    """
    if request.config.as_written and request.x.dtype in (torch.bfloat16, torch.float16):
        return None
    backend = _modulating_backend(request, known_readable)
    if backend is None:
        return None
    family: NormFamily = backend.norm.kernels[request.config.family]
    if gate is not None:
        supports = family.supports_gate
        if supports is None or supports(request.config, request.x, gate) is not None:
            return None
        if not known_readable and not (readable if on_cpu(request.x) else readable_on_gpu)(gate.values):
            return None
    return family


def _modulating_backend(request: NormRequest, known_readable: bool) -> Backend | None:
    """The backend whose kernels do all that `modulated_kernel` names, gates aside: on a GPU by default only where the
    bare norm would be Triton's too, since nothing was measured there."""
    if _forced.name == TRITON.name or (_forced.name is None and not on_cpu(request.x)):
        if _triton_obstacle(request, "norm") is not None:
            return None
        bare = request._replace(residual=None, weight=None, bias=None)
        return TRITON if resolve(bare).backend is TRITON else None
    if _forced.name not in (None, CPU.name) or _kernel_obstacle(request, "norm", known_readable) is not None:
        return None
    return CPU


def running_stats_kernel(request: RunningStatsRequest, kernel: str = "update") -> Callable[..., Any] | None:
    """The kernel of this name that updates running averages in one launch, or None: torch's operations do it then."""
    return _kernel_on_gpu(request, "running_stats", kernel)


def lengths_kernel(request: LengthsRequest) -> Callable[[LengthsRequest], Tensor] | None:
    """The kernel that makes a mask of lengths in one launch, or None: torch's operations do it then, in two."""
    return None if _is_compiling() else _kernel_on_gpu(request, "lengths", "mask")


def _kernel_on_gpu(request: Any, operation: str, kernel: str) -> Callable[..., Any] | None:
    """Triton's, on a GPU alone, and not where another backend than its own is forced."""
    if _forced.name not in (None, TRITON.name) or on_cpu(request.x):
        return None
    found: Operation = getattr(TRITON, operation)
    return None if _triton_obstacle(request, operation) is not None else found.kernels[kernel]


def _resolve_forced(request: Any, operation: str) -> Resolved:
    backend = BACKENDS[_forced.name]  # type: ignore[index]
    obstacles = {"cpu": _kernel_obstacle, "aten": _aten_obstacle, "triton": _triton_obstacle}
    found = obstacles.get(backend.name)
    obstacle = found(request, operation) if found else getattr(backend, operation).supports(request)
    if obstacle is not None:
        raise _cannot(_name(request), obstacle)
    return Resolved(backend, "forced")


def _name(request: Any) -> str:
    return "recurrence" if isinstance(request, RecurrenceRequest) else str(request.config.op)


def reference_only(op: str, why: str) -> None:
    """BackendError if another backend than the reference is forced for what it alone can run."""
    if _forced.name not in (None, "reference"):
        raise _cannot(op, why)


def _cannot(op: str, why: str) -> BackendError:
    return BackendError(
        f"backend {_forced.name!r} was forced but cannot run {op}: {why}. "
        "Leave the choice to normwise with normwise.backend(None), or force 'reference', which runs everything."
    )


def _kernel_obstacle(request: Any, operation: str, known_readable: bool = False) -> str | None:
    """What keeps the C++ kernels from a request, or None."""
    if _is_compiling():
        # A recurrence becomes one node (custom_op/); but ONNX, for one, knows no such node.
        if operation == "norm" or not on_cpu(request.x) or torch.onnx.is_in_onnx_export():
            return "while compiling, ATen's operations are left to the compiler"
        if request.config.norm == "batch":
            return "while compiling, a recurrence with batch norm is ATen's loop: no node takes or gives its statistics"
        return CPU.recurrence.supports(request)
    if is_traced_or_transformed():
        return "torch.func, forward-mode derivatives, dispatch modes and torch.jit.trace do not see a C++ kernel"
    supports: Callable[[Any], str | None] = getattr(CPU, operation).supports
    return (None if known_readable else unreadable(*request.tensors)) or supports(request)


def _aten_obstacle(request: Any, operation: str) -> str | None:
    """What keeps ATen from a request, or None."""
    if operation == "norm" and is_masked_batch(request) and not _is_compiling():
        others = type(request.x) not in (Tensor, torch.nn.Parameter) or is_traced_or_transformed()
        if others and not on_cpu(request.x):
            return "what ATen's kernels make of a mask has a gradient of its own, which only plain tensors can follow"
    supports: Callable[[Any], str | None] = getattr(ATEN, operation).supports
    return supports(request)


def is_masked_batch(request: NormRequest) -> bool:
    """Whether statistics of channels or groups are taken of what a mask leaves."""
    return request.mask is not None and request.config.family != "features" and request.config.batch_statistics


def _triton_obstacle(request: Any, operation: str) -> str | None:
    """What keeps the Triton kernels from a request, or None."""
    if _is_compiling():
        # A node that calls the kernels (custom_op/): of a recurrence, which would be a loop, and where they are forced.
        if torch.onnx.is_in_onnx_export():
            return "an export to ONNX has no node for a Triton kernel"
        if operation == "norm" and _forced.name is None:
            return "while compiling, a norm's operations are left to the compiler"
        return runtime.obstacle(request.x) or getattr(TRITON, operation).supports(request)
    if is_traced_or_transformed():
        return "torch.func, forward-mode derivatives, dispatch modes and torch.jit.trace do not see a Triton kernel"
    reason: str | None = runtime.obstacle(request.x) or getattr(TRITON, operation).supports(request)
    if reason is None and not (readable if on_cpu(request.x) else readable_on_gpu)(*request.tensors):
        return "the Triton kernels take plain dense tensors on one device"
    return reason


def unreadable(*tensors: Tensor | None) -> str | None:
    """What keeps kernels from tensors that are not `readable`, or None."""
    if readable(*tensors):
        return None
    found = next(t for t in tensors if t is not None and not readable(t))
    return f"the C++ kernels take plain dense tensors on the CPU, not {_described(found)}"


def _described(t: Tensor) -> str:
    if type(t) not in (Tensor, torch.nn.Parameter):
        return type(t).__name__
    if t.device.type != "cpu":
        return f"a tensor on {t.device}"
    kinds = {"negative": t.is_neg(), "conjugate": t.is_conj(), "nested": t.is_nested, "quantized": t.is_quantized}
    kind = next((name for name, found in kinds.items() if found), None)
    if kind is None:
        kind = "wrapped" if t.layout is torch.strided else str(t.layout).removeprefix("torch.")
    return f"a {kind} tensor"


@cache
def _warn_once(why_not: str) -> None:
    """The library is the only thing that is missing: whoever waits for a slow model should know."""
    if os.environ.get("NORMWISE_KERNEL_WARNING") != "off":
        warnings.warn(
            f"normwise runs without its compiled CPU kernels, by slower operations of PyTorch: {why_not}. "
            "NORMWISE_KERNEL_WARNING=off in the environment silences this warning, which comes once.",
            KernelWarning,
        )


def is_transforming() -> bool:
    """Inside vmap, grad or another torch.func transform, where no value of a tensor can be looked at."""
    return not _is_compiling() and transforms_active()


def is_traced_or_transformed() -> bool:
    """Whether somebody looks on who sees ATen's operations only, in eager mode: a torch.func transform, forward-mode
    derivatives, a dispatch mode (make_fx) or torch.jit.trace."""
    return transforms_active() or dispatch_modes_active() > 0 or forward_ad_active() or is_jit_tracing()


def jit_traces() -> bool:
    """Whether torch.jit.trace looks on."""
    return not _is_compiling() and is_jit_tracing()


def have_values(*tensors: Tensor | None) -> bool:
    """Whether these tensors have values that can be read, if need be by a wait for their device: not while compiling or
    transforming, nor on meta."""
    if _is_compiling() or transforms_active():
        return False
    return not any(t is not None and (t.is_meta or is_fake(t)) for t in tensors)


def values_visible(*tensors: Tensor | None) -> bool:
    """Whether the values of these tensors may decide what is done: those of `have_values` that are on the CPU."""
    return have_values(*tensors) and all(t is None or on_cpu(t) for t in tensors)


def may_look_at_values(x: Tensor) -> bool:
    """Whether a look at the values of `x` is possible and cheap: elsewhere than on the CPU it waits for the queue, and
    tensors of other kinds answer for themselves."""
    return values_visible() and readable(x) and not is_traced_or_transformed()


def found() -> dict[str, str | None]:
    """For each backend, what keeps it from being used on this machine, or None if nothing does."""
    return {name: backend.missing() for name, backend in BACKENDS.items()}


try:
    force(os.environ.get("NORMWISE_BACKEND") or None)
except ValueError as error:
    raise ValueError(f"environment variable NORMWISE_BACKEND: {error}") from None
