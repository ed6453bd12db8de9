"""The recurrent layers that are proven and timed, the designs of their kernels, and what they are held against."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normwise
from benchmarks.gpu.norm_cases import error_of
from normwise.backends.triton import rnn
from normwise.ops.dispatch import BackendError

Shape = tuple[int, int, int, int]  # T, B, I, H
SHAPES: tuple[Shape, ...] = ((100, 32, 256, 256), (100, 64, 512, 512), (784, 32, 1, 128), (512, 128, 1024, 1024))
CELLS = ("LSTM", "GRU", "RNN")
DTYPES = ("bfloat16", "float32", "float16", "tf32")
MODES = ("forward+backward", "forward")

# The error allowed to an output or gradient of a few steps, as a share of its largest element. TF32 has as many digits
# as float16.
ALLOWED = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 4e-3, "tf32": 4e-3}


def designs() -> dict[str, Callable[[], AbstractContextManager[object]]]:
    """For each design of the kernels, what makes `normwise.backend("triton")` take it alone, or refuse."""

    def only(name: str) -> AbstractContextManager[object]:
        def chosen(at: Any) -> tuple[str, dict[str, str]]:
            reason = rnn.DESIGNS[name].obstacle(at)
            if reason is not None:
                raise BackendError(reason)
            return name, {}

        return mock.patch.object(rnn, "chosen", chosen)

    return {name: partial(only, name) for name in rnn.DESIGNS}


class Case(NamedTuple):
    """A layer of one direction, or of both, with lengths and resets or without."""

    cell: str
    shape: Shape
    dtype: str
    variant: str | None = None
    rms: bool = False
    ragged: bool = False

    @property
    def name(self) -> str:
        kind = f"{'RMS' if self.rms else 'LN'}-{self.cell}{f' {self.variant}' if self.variant else ''}"
        return f"{kind} {self.shape} {self.dtype}{', lengths and resets, both directions' if self.ragged else ''}"


class Built:
    """A case with its layer and tensors, on a device."""

    def __init__(self, case: Case, device: str, dtype: torch.dtype) -> None:
        self.case, (steps, batch, inputs, units) = case, case.shape
        self.layer = getattr(normwise, case.cell)(
            inputs, units, bidirectional=case.ragged, norm="rms" if case.rms else "layer", variant=case.variant,
            device=device, dtype=dtype,
        )  # fmt: skip
        self.x = torch.randn(steps, batch, inputs, device=device).to(dtype).requires_grad_()
        self.upstream = torch.randn(steps, batch, units * (2 if case.ragged else 1), device=device).to(dtype)
        self.options: dict[str, Any] = {}
        if case.ragged:
            lengths = torch.linspace(1, steps, batch).round().long()
            # What lies behind a sequence's end is no number.
            ended = torch.arange(steps)[:, None] >= lengths
            with torch.no_grad():
                self.x[ended.to(device)] = torch.nan
            self.options = {"lengths": lengths, "reset": (torch.rand(steps, batch) < 0.2).to(device)}

    def step(self, layer: nn.Module) -> list[Tensor]:
        """Output, and the gradients of the input and all parameters."""
        output = layer(self.x, **self.options)[0]
        leaves = [self.x, *layer.parameters()]
        return [output, *torch.autograd.grad(output, leaves, self.upstream)]

    def inference(self, layer: nn.Module) -> Tensor:
        with torch.no_grad():
            return layer(self.x, **self.options)[0]  # type: ignore[no-any-return]

    def call(self, mode: str, layer: nn.Module, backend: str | None = None, design: Any = nullcontext) -> Any:
        run = self.step if mode == MODES[0] else self.inference

        def call() -> object:
            with normwise.backend(backend), design():
                return run(layer)

        return call

    def truth(self) -> list[Tensor]:
        """The same by the reference in float64 on the CPU, from the values as they are."""
        exact = copy.copy(self)
        exact.x = self.x.detach().cpu().double().requires_grad_()
        exact.upstream = self.upstream.cpu().double()
        exact.options = {name: t.cpu() for name, t in self.options.items()}
        with normwise.backend("reference"):
            return exact.step(copy.deepcopy(self.layer).cpu().double())

    def error(self, found: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
        return error_of(found, truth, ALLOWED[self.case.dtype])


# The cells as one writes them for torch.compile, from `given`, which is all of the input term that needs no state.


def lstm(given: Tensor, states: tuple[Tensor, ...], w: dict[str, Tensor]) -> tuple[Tensor, ...]:
    h, c = states
    i, f, g, o = (given + _norm(F.linear(h, w["weight_hh"]), w["gain_hh"])).chunk(4, 1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(_norm(c, w["gain_c"], w["bias_c"])), c


def gru(given: Tensor, states: tuple[Tensor, ...], w: dict[str, Tensor]) -> tuple[Tensor, ...]:
    (h,) = states
    q = _in_two(F.linear(h, w["weight_hh"]), w["gain_hh"]) + w["bias_hh"]
    r, z, n = given.chunk(3, 1)
    qr, qz, qn = q.chunk(3, 1)
    z = torch.sigmoid(z + qz)
    return (z * h + (1 - z) * torch.tanh(n + torch.sigmoid(r + qr) * qn),)


def simple(given: Tensor, states: tuple[Tensor, ...], w: dict[str, Tensor]) -> tuple[Tensor, ...]:
    (h,) = states
    return (torch.tanh(_norm(given + F.linear(h, w["weight_hh"]), w["gain_sum"]) + w["bias_ih"]),)


def _norm(t: Tensor, gain: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.layer_norm(t, gain.shape, gain, bias)


def _in_two(t: Tensor, gain: Tensor) -> Tensor:
    """A norm over two gates and one over the third."""
    most = 2 * len(gain) // 3
    return torch.cat([_norm(t[..., :most], gain[:most]), _norm(t[..., most:], gain[most:])], -1)


class CompiledCell(nn.Module):
    """A normwise layer's default as a loop over a compiled cell, the input projection before the loop."""

    def __init__(self, layer: nn.Module, cell: str, backend: str) -> None:
        super().__init__()
        self.layer, self.cell = layer, cell
        torch.compiler.reset()  # else it gives up after a few shapes, or makes them variable
        self.compiled = torch.compile({"LSTM": lstm, "GRU": gru, "RNN": simple}[cell], dynamic=False, backend=backend)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        w = {name.removesuffix("_l0"): p for name, p in self.layer.named_parameters()}
        given = F.linear(x, w["weight_ih"])
        if self.cell == "LSTM":
            given = _norm(given, w["gain_ih"], w["bias_ih"] + w["bias_hh"])
        elif self.cell == "GRU":
            given = _in_two(given, w["gain_ih"]) + w["bias_ih"]
        start = x.new_zeros(x.shape[1], w["weight_hh"].shape[1])
        states: tuple[Tensor, ...] = (start, start.clone()) if self.cell == "LSTM" else (start,)
        outputs = []
        for one in given.unbind(0):
            states = self.compiled(one, states, w)
            outputs.append(states[0])
        return torch.stack(outputs), states


def proofs() -> list[Case]:
    """What is proven before anything is timed: sizes that fill a block and that do not, and every preset once."""
    found = [
        Case(cell, (6, 5, 7, units), dtype, ragged=ragged)
        for dtype in DTYPES
        for cell in CELLS
        for units, ragged in ((33, True), (64, False), (128, True), (512, True))
    ]
    found += [Case(cell, (4, *shape[1:]), dtype) for dtype in DTYPES[:2] for cell in CELLS for shape in SHAPES]
    for cell in CELLS:
        presets = normwise_presets(cell)
        found += [Case(cell, (4, 3, 5, 48), "float32", variant=name, rms=rms) for name in presets for rms in (0, 1)]
    return found


def normwise_presets(cell: str) -> list[str]:
    from normwise.ops.rnn.presets import PRESETS

    return [name for name, config in PRESETS[cell.lower()].items() if config.norm == "layer"]
