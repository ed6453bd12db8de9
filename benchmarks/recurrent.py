"""Recurrent layers against torch.nn's un-normalized ones, against an eager loop, and against themselves."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import normwise
from benchmarks.case import Case

# (T, B, I, H): usual, one sample, large, pixel by pixel.
SHAPES = [(100, 32, 256, 256), (100, 1, 256, 256), (100, 64, 512, 512), (784, 32, 1, 128)]
Shape = tuple[int, int, int, int]
Step = Callable[[], object]

# The error allowed to an output or a gradient, as a share of its largest element: roundings add up over the steps.
# Of torch's operations in bfloat16 these are up to 3.4e-2.
ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
CHECKED_STEPS, CHECKED_BATCH = 12, 3


def cases() -> Iterator[Case]:
    for shape in SHAPES:
        yield against_torch("LSTM", shape, must=1.05, aim=0.65)
    for shape in SHAPES:
        yield against_torch("LSTM", shape, train=False, must=0.90, aim=0.70)
    for kind in ("GRU", "RNN"):
        for shape in SHAPES:
            yield against_torch(kind, shape, must=0.90, aim=0.60)
    for kind in ("LSTM", "GRU", "RNN"):
        for shape in SHAPES:
            yield against_torch(kind, shape, norm=None, must=0.90, aim=0.60)
    for shape in SHAPES[::3]:
        yield lengths_against_padded(shape, must=0.65, aim=0.55)
    yield bfloat16_against_float32(SHAPES[2], must=0.60, aim=0.35)
    yield bfloat16_against_torch(SHAPES[2])


def against_torch(
    kind: str, shape: Shape, *, norm: str | None = "layer", train: bool = True, must: float, aim: float
) -> Case:
    """Training: forward and backward for the gradients of input and parameters. Else the forward under no_grad."""
    ours, theirs = getattr(normwise, kind)(*shape[2:], norm=norm), getattr(nn, kind)(*shape[2:])
    x, upstream = input_of(shape), torch.randn(*shape[:2], shape[3])
    step = training_step if train else _forward_step
    name = f"{'LN-' if norm else 'plain '}{kind} {'train' if train else 'forward'} {shape}"
    return case_of(name, ours, step(ours, x, upstream), step(theirs, x, upstream), f"nn.{kind}", shape, must, aim)


def lengths_against_padded(shape: Shape, *, must: float, aim: float) -> Case:
    """Lengths uniform in 1..T, evenly so lest luck decide, against the same layer over all of the padding."""
    layer, x, upstream = normwise.LSTM(*shape[2:]), input_of(shape), torch.randn(*shape[:2], shape[3])
    lengths = torch.linspace(1, shape[0], shape[1]).round().long()[torch.randperm(shape[1])]
    ragged = training_step(layer, x, upstream, lengths=lengths)
    padded = training_step(layer, x, upstream)
    return case_of(f"LN-LSTM train {shape}, lengths", layer, ragged, padded, "padded", shape, must, aim)


def bfloat16_against_float32(shape: Shape, *, must: float, aim: float) -> Case:
    """Parameters, input and output in bfloat16 against the same layer in float32."""
    ours, theirs = normwise.LSTM(*shape[2:], dtype=torch.bfloat16), normwise.LSTM(*shape[2:])
    x, upstream = input_of(shape), torch.randn(*shape[:2], shape[3])
    step = training_step(ours, x.detach().bfloat16().requires_grad_(), upstream.bfloat16())
    name = f"LN-LSTM train {shape}, bfloat16"
    return case_of(name, ours, step, training_step(theirs, x, upstream), "float32", shape, must, aim)


def bfloat16_against_torch(shape: Shape) -> Case:
    """The same against torch.nn's layer without norms, which oneDNN runs."""
    ours, theirs = normwise.LSTM(*shape[2:], dtype=torch.bfloat16), nn.LSTM(*shape[2:], dtype=torch.bfloat16)
    x, upstream = input_of(shape).detach().bfloat16().requires_grad_(), torch.randn(*shape[:2], shape[3]).bfloat16()
    steps = training_step(ours, x, upstream), training_step(theirs, x, upstream)
    return case_of(f"LN-LSTM train {shape}, both bfloat16", ours, *steps, "nn.LSTM", shape)


def input_of(shape: Shape) -> Tensor:
    return torch.randn(*shape[:3], requires_grad=True)


def training_step(layer: nn.Module, x: Tensor, upstream: Tensor, **options: Tensor) -> Step:
    leaves = [x, *layer.parameters()]
    return lambda: torch.autograd.grad(layer(x, **options)[0], leaves, upstream)


def _forward_step(layer: nn.Module, x: Tensor, upstream: Tensor) -> Step:
    def step() -> object:
        with torch.no_grad():
            return layer(x)

    return step


def _with_backend(name: str, step: Step) -> Step:
    def forced() -> object:
        with normwise.backend(name):
            return step()

    return forced


def case_of(
    name: str,
    layer: nn.Module,
    ours: Step,
    theirs: Step,
    against: str,
    shape: Shape,
    must: float | None = None,
    aim: float | None = None,
) -> Case:
    _, batch, inputs, units = shape
    rows, stacked, dtype = shape[0] * batch, layer.weight_hh_l0.shape[0], layer.weight_hh_l0.dtype
    x, w = torch.randn(rows, inputs + units, dtype=dtype), torch.randn(inputs + units, stacked, dtype=dtype)
    products = 1 if " forward " in name else 3
    return Case(
        name,
        ours,
        theirs,
        against,
        lambda: _error(layer, shape),
        limit=lambda: x @ w,
        limit_name="its products, each for all steps at once",
        limit_scale=products,
        must=must,
        aim=aim,
    )


def _error(layer: nn.Module, shape: Shape) -> float:
    """Of outputs and gradients over fewer steps and samples: the truth is a slow loop in float64."""
    steps, batch, dtype = min(CHECKED_STEPS, shape[0]), min(CHECKED_BATCH, shape[1]), layer.weight_hh_l0.dtype
    x, upstream = torch.randn(steps, batch, shape[2], dtype=dtype), torch.randn(steps, batch, shape[3], dtype=dtype)
    lengths = torch.randint(1, steps + 1, (batch,))

    def run(layer: nn.Module, dtype: torch.dtype, backend: str) -> list[Tensor]:
        at = x.to(dtype).requires_grad_()
        with normwise.backend(backend):
            output = layer(at, lengths=lengths)[0]
        return [output.detach(), *torch.autograd.grad(output, [at, *layer.parameters()], upstream.to(dtype))]

    truth = run(copy.deepcopy(layer).double(), torch.float64, "reference")
    pairs = zip(run(layer, dtype, "cpu"), truth, strict=True)
    return max(float((got.double() - true).abs().max() / true.abs().max()) for got, true in pairs) / ALLOWED[dtype]
