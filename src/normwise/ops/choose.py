"""Which backend runs a call: the only place that decides.

- `torch`: ATen's own kernel, where it does the same job as well.
- `cpu`: our C++ kernels.
- `triton`: our GPU kernels.
- `reference`: plain PyTorch operations; always works.

`with normwise.backend("reference"):` or the environment variable NORMWISE_BACKEND forces one for the whole process;
a forced backend never falls back but raises `BackendError` with the reason. Where only a missing library keeps the C++
kernels from a call, `KernelWarning` says so once; NORMWISE_KERNEL_WARNING=off silences it.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from normwise.kernels import cpu
from normwise.kernels.arguments import readable, unreadable
from normwise.reference import accumulation_dtype

BACKENDS = ("torch", "cpu", "triton", "reference")

# ATen scales by x * a + b, where a = weight * rstd and b = bias - mean * a nearly cancel when the mean dwarfs the
# deviation: its error is about 1e-7 times this ratio. Up to 32 that stays within a few float32 roundings.
MEAN_TO_DEVIATION_LIMIT = 32.0

# ATen's BatchNorm on rows of channels, (N, C) or channels-last, adds up each channel in one float32 variable per
# thread, and so does the backward of all its norms but RMSNorm for the gradients of gain and bias; up to this many
# elements the error of that sum stays within a few float32 roundings.
RUNNING_SUM_LIMIT = 1 << 14

# Elements, and elements of a row, up to which ATen's LayerNorm, whose gradient needs no Python, takes less time than
# our kernel.
SMALL, SHORT_ROW = 1 << 12, 1 << 11

# A variance of more than 1e38 leaves float32, in which running averages are kept.
SMALLEST_RSTD = 1e-19


# What is asked in each call, at hand.
_float32 = torch.float32
_grad_enabled = torch.is_grad_enabled
# Of all that compile, Dynamo alone shows plain tensors to Python: this costs half of torch.compiler.is_compiling.
_is_compiling = torch.compiler.is_dynamo_compiling
_transforms_active = torch._C._are_functorch_transforms_active
_modes_active = torch._C._len_torch_dispatch_stack
_is_tracing = torch._C._is_tracing


class BackendError(RuntimeError):
    """A forced backend cannot run the call."""


class KernelWarning(UserWarning):
    """The compiled kernels would have run a call, but cannot be loaded: slower operations did."""


class Choice(NamedTuple):
    """The backend of a call and why it was taken."""

    backend: str
    reason: str


class Call(NamedTuple):
    """What the choice depends on.

    Attributes:
        op: the op's name, as in `normwise.functional`.
        x: its input.
        dims: the axes of `x` that share statistics, ascending.
        weight, bias: the gain and what is added after it.
        mask: which elements count, with as many axes as `x`; None for all.
        residual: what is added inside the same kernel.
        averages: the running mean and variance that are used or moved.
        batch_statistics: statistics are taken from `x` (training), not given.
        fixed_momentum: the running averages, if any, move by a plain number (ATen takes no tensor).
        uncompiled: what keeps the op's C++ kernel from this call, where only the op itself can tell.
        over_ranks: the statistics are those of several ranks together.
    """

    op: str
    x: Tensor
    dims: tuple[int, ...]
    weight: Tensor | None = None
    bias: Tensor | None = None
    mask: Tensor | None = None
    residual: Tensor | None = None
    averages: tuple[Tensor, Tensor] | None = None
    batch_statistics: bool = True
    fixed_momentum: bool = True
    uncompiled: str | None = None
    over_ranks: bool = False


class _Forced:
    """The forced backend. An object's attribute, because torch.compile can read and guard it: a ContextVar it cannot
    read, and 2.11 does not guard a class's attribute."""

    name: str | None = None


_forced = _Forced()


def force(name: str | None) -> None:
    """Force backend `name` from now on; None lets `choose` decide again. ValueError names the known backends."""
    if name is not None and name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}: expected one of {', '.join(map(repr, BACKENDS))}")
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


def choose(call: Call) -> Choice:
    """The backend for `call` and the reason. Raises `BackendError` if a forced backend cannot run it."""
    if _forced.name is not None:
        obstacle = _OBSTACLES[_forced.name](call)
        if obstacle is not None:
            raise BackendError(
                f"backend {_forced.name!r} was forced but cannot run {call.op}: {obstacle}. "
                "Leave the choice to normwise with normwise.backend(None), or force 'reference', which runs everything."
            )
        return Choice(_forced.name, "forced")
    if transforming():
        return Choice("reference", "inside a torch.func transform")
    uncompiled = _cpu_obstacle(call)
    if uncompiled is None:
        return Choice("cpu", "the compiled kernel")
    if not torch.compiler.is_compiling() and uncompiled is cpu.why_not() and not cpu.turned_off():
        _tell_once(uncompiled)
    obstacle = _torch_obstacle(call) or _torch_weakness(call)
    if obstacle is None:
        return Choice("torch", "ATen's kernel does the same job")
    return Choice("reference", obstacle)


@cache
def _tell_once(why_not: str) -> None:
    """The library is the only thing that is missing: whoever waits for a slow model should know."""
    if os.environ.get("NORMWISE_KERNEL_WARNING") != "off":
        warnings.warn(
            f"normwise runs without its compiled CPU kernels, by slower operations of PyTorch: {why_not}. "
            "NORMWISE_KERNEL_WARNING=off in the environment silences this warning, which comes once.",
            KernelWarning,
        )


def transforming() -> bool:
    """Inside vmap, grad or another torch.func transform, where no value of a tensor can be looked at."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def values_visible(*tensors: Tensor | None) -> bool:
    """Whether the values of these tensors may decide what is done: not while compiling or transforming, nor on meta."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    return not any(t is not None and (t.is_meta or is_fake(t)) for t in tensors)


def watches_digits(x: Tensor) -> bool:
    """Whether ATen's result for `x` is to be judged by `loses_digits` before it is used.

    Only on the CPU (on a GPU a look at a value would wait for the queue, and ATen's kernels there subtract the mean
    first), not of tensors of other kinds, which answer for themselves, and not when a backend was forced, which never
    falls back.
    """
    return _forced.name is None and values_visible() and readable(x) and x.numel() > 0


def long_gain_sums(x: Tensor, weight: Tensor | None, terms: int) -> bool:
    """Whether ATen would lose digits of a gain's gradient, a sum of so many `terms` that it adds up in one float32
    variable per thread; `times_gain` of ATen's result without gain and bias does not."""
    return (
        weight is not None
        and terms > RUNNING_SUM_LIMIT
        and x.dtype is _float32
        and weight.requires_grad
        and _grad_enabled()
    )


def plain(x: Any) -> bool:
    """Whether a call with nothing but this input and parameters leaves the choice to us: float32 that C may read, no
    backend forced, no compiler, torch.func transform or torch.jit.trace looking on. Such calls may be short, and what
    Python does in them counts."""
    return (
        type(x) is Tensor
        and x.dtype is _float32
        and _forced.name is None
        and not _is_compiling()
        and readable(x)
        and not _transforms_active()
        and not _is_tracing()
    )


def compiles_plain(x: Tensor) -> bool:
    """Whether our C++ kernels take the input of a plain call as it lies in memory."""
    return (
        x.is_contiguous()
        and x.numel() > 0
        and not _modes_active()
        and forward_ad._current_level < 0
        and cpu.available()
    )


def observed() -> bool:
    """Whether somebody looks on who sees ATen's operations only, in eager mode: a torch.func transform, forward-mode
    derivatives, a dispatch mode (make_fx) or torch.jit.trace. What a compiled kernel does would pass them by."""
    return _transforms_active() or _modes_active() > 0 or forward_ad._current_level >= 0 or _is_tracing()


def jit_traces() -> bool:
    """Whether torch.jit.trace looks on."""
    return not torch.compiler.is_compiling() and _is_tracing()


def may_take(*tensors: Tensor | None) -> bool:
    """Whether a compiled kernel's backward may take these: upstream gradients that nobody differentiates again, or in
    forward mode, and that are no batch of gradients (torch.func.vmap, is_grads_batched) nor another kind of tensor; and
    saved tensors, in whose place a hook may have put anything."""
    return (
        not _grad_enabled()
        and not _is_compiling()
        and not _transforms_active()
        and not _modes_active()
        and forward_ad._current_level < 0
        and readable(*tensors)
    )


def loses_digits(mean: Tensor, rstd: Tensor) -> bool:
    """Whether ATen lost digits to cancellation with these statistics, or they are NaN, infinite or next to it."""
    if not readable(mean, rstd):
        return False  # a gain of another kind, or a dispatch mode, made them something without values to look at
    if mean.dtype is torch.float32 and cpu.available():
        return cpu.mean_exceeds(mean.contiguous(), rstd.contiguous(), MEAN_TO_DEVIATION_LIMIT)
    fine = ((mean.abs() * rstd).amax() <= MEAN_TO_DEVIATION_LIMIT) & (rstd.amin() > SMALLEST_RSTD)
    return not bool(fine)


def found() -> dict[str, str | None]:
    """For each backend, what keeps it from being used on this machine, or None if nothing does."""
    return {"torch": None, "cpu": cpu.why_not(), "triton": _NO_TRITON, "reference": None}


_NO_TRITON = "this version of normwise has no Triton kernels"


def _cpu_obstacle(call: Call) -> str | None:
    """What the compiled CPU kernels cannot do."""
    x, mask = call.x, call.mask
    if torch.compiler.is_compiling():
        return "while compiling, ATen's operations are left to the compiler"
    if call.op not in _COMPILED:
        return f"there is no C++ kernel for {call.op}"
    if call.uncompiled is not None:
        return call.uncompiled
    if call.over_ranks:
        return "the C++ kernels know nothing of other ranks"
    if observed():
        return "torch.func, forward-mode derivatives, dispatch modes and torch.jit.trace do not see a C++ kernel"
    if call.residual is not None and call.residual.dtype != x.dtype:
        return f"the C++ kernels do not mix an input of {x.dtype} with a residual of {call.residual.dtype}"
    by_features = call.op in ("layer_norm", "rms_norm")
    if _without_features(call):
        return "there is nothing to compute without a feature"
    if mask is not None and any(mask.shape[d] != 1 for d in (call.dims if by_features else (1,))):
        return "the C++ kernels take one mask for " + ("all features of a row" if by_features else "all channels")
    statistics = accumulation_dtype(x.dtype)
    # InstanceNorm moves its averages itself, by what the kernel says of each sample.
    for average in call.averages or () if call.op != "instance_norm" else ():
        if average.dtype != statistics or not average.is_contiguous():
            return f"the C++ kernels keep contiguous running averages of {statistics} beside {x.dtype}"
    others = unreadable(call.weight, call.bias, mask, call.residual, *(call.averages or ())) if x.is_cpu else None
    return others or cpu.obstacle(x)


def _torch_obstacle(call: Call) -> str | None:
    """What ATen's kernels cannot do."""
    if call.over_ranks:
        return "ATen's kernels know nothing of other ranks"
    if call.mask is not None:
        return "ATen's kernels take no mask"
    if not call.fixed_momentum:
        return "ATen takes momentum as a number only"
    if call.op == "batch_norm" and call.batch_statistics and call.averages and call.x.numel() == call.x.shape[1]:
        return "ATen moves the running variance to NaN by the deviation of a single value"
    weight = call.weight
    if weight is not None and weight.dtype != call.x.dtype:
        half = call.x.dtype in (torch.bfloat16, torch.float16)
        if call.op == "rms_norm" or not half or weight.dtype != torch.float32:
            return f"ATen does not mix an input of {call.x.dtype} with a gain of {weight.dtype}"
    trailing = tuple(range(call.x.dim() - len(call.dims), call.x.dim()))
    if call.op in ("layer_norm", "rms_norm") and call.dims != trailing:
        return "ATen normalizes trailing axes only"
    if call.op == "instance_norm" and call.x.numel() == 0:
        return "ATen's InstanceNorm fails on an empty input or turns its running averages into NaN"
    return None


def _torch_weakness(call: Call) -> str | None:
    """Where ATen's kernels would do the job, but less exactly than they should."""
    x = call.x
    if _without_features(call) or (call.op == "group_norm" and not x.numel()):
        return "some of ATen's kernels fail, or give NaN gradients, without an element"
    if call.averages is not None and call.batch_statistics and jit_traces():
        # A traced graph is optimized at its second run, and does not know that ATen's kernel writes on the averages.
        return "torch.jit loses what ATen's kernel does to running averages"
    if call.op == "rms_norm" and watches_digits(x):
        return "ATen's RMSNorm is these operations too, but makes zeros of an input whose squares overflow"
    if type(x) not in (Tensor, torch.nn.Parameter):
        return None  # another kind of tensor knows ATen's norms, and the formula may be more than it can do
    if call.op != "batch_norm" or not call.batch_statistics or x.device.type != "cpu" or x.numel() == 0:
        return None
    rows_of_channels = x.dim() == 2 or not x.is_contiguous()
    if rows_of_channels and x.numel() // x.shape[1] > RUNNING_SUM_LIMIT and x.dtype != torch.float64:
        return "ATen adds up long columns of channels in one float32 sum, which loses digits"
    return None


def _without_features(call: Call) -> bool:
    """Whether an axis of channels, or a normalized axis of LayerNorm and RMSNorm, has size 0."""
    if call.x.numel() or call.op == "recurrence":
        return False
    return 0 in [call.x.shape[d] for d in (call.dims if call.op in ("layer_norm", "rms_norm") else (1,))]


def is_fake(t: Tensor) -> bool:
    """Whether `t` has a device and a shape, but no values."""
    if type(t) is Tensor:
        return False
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(t, FakeTensor)


_OBSTACLES = {
    "torch": _torch_obstacle,
    "cpu": _cpu_obstacle,
    "triton": lambda call: _NO_TRITON,
    "reference": lambda call: None,
}

_COMPILED = ("batch_norm", "group_norm", "instance_norm", "layer_norm", "recurrence", "rms_norm")

try:
    force(os.environ.get("NORMWISE_BACKEND") or None)
except ValueError as error:
    raise ValueError(f"environment variable NORMWISE_BACKEND: {error}") from None
