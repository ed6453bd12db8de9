"""Cases made of layers: forward and backward of ours and torch's, checked against the reference in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import normwise
from benchmarks.case import Case

# The error allowed to a result, as a share of its largest element: a few roundings of the dtype.
ALLOWED = {torch.float32: 2e-6, torch.bfloat16: 2e-2}

Step = Callable[[nn.Module, Sequence[Tensor]], Sequence[Tensor]]


def call(layer: nn.Module, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
    """The plain forward."""
    return (layer(inputs[0]),)


def layer_case(
    name: str,
    ours: nn.Module,
    theirs: nn.Module,
    inputs: Sequence[Tensor],
    *,
    our_step: Step = call,
    their_step: Step = call,
    against: str = "torch.nn",
    tensors_moved: float = 5,
    must: float | None = None,
    aim: float | None = None,
) -> Case:
    """Forward and backward with random upstream gradients, for the gradients of all inputs and parameters.

    `tensors_moved`: how many tensors of the input's size must be read or written at least.
    """
    theirs.load_state_dict(ours.state_dict(), strict=False)
    wanted = [t.requires_grad_() for t in inputs]
    outputs = our_step(ours, inputs)
    upstream = [torch.randn_like(y) for y in outputs]

    def step(layer: nn.Module, forward: Step, at: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
        found = forward(layer, at)
        leaves = [*at, *layer.parameters()]
        return [*found, *torch.autograd.grad(found, leaves, gradients)]

    def error() -> float:
        exact = copy.deepcopy(ours).double()
        at = [t.detach().double().requires_grad_() for t in wanted]
        with normwise.backend("reference"):
            truth = step(exact, our_step, at, [g.double() for g in upstream])
        got = step(ours, our_step, wanted, upstream)
        plain = step(theirs, their_step, wanted, upstream)
        same = len(plain) == len(got)  # a step may return or train something that torch's does not have
        others = plain if same else [None] * len(got)
        return max(_error(g, t, other) for g, t, other in zip(got, truth, others, strict=True))

    source, target = inputs[0].detach(), torch.empty_like(inputs[0])
    return Case(
        name,
        lambda: step(ours, our_step, wanted, upstream),
        lambda: step(theirs, their_step, wanted, upstream),
        against,
        error,
        limit=lambda: target.copy_(source),
        limit_name="copy of the same bytes",
        limit_scale=tensors_moved / 2,
        must=must,
        aim=aim,
    )


def _error(got: Tensor, truth: Tensor, other: Tensor | None) -> float:
    """The largest error, as a share of what is allowed: of what `other` errs by where that is more. (The gradient of a
    batch of two all but cancels; torch's is wrong in its fourth digit there.)"""
    if not got.numel():
        return 0.0
    allowed = ALLOWED[got.dtype] * float(truth.detach().abs().max())
    if other is not None and other.shape == got.shape:
        allowed = max(allowed, _distance(other, truth))
    return _distance(got, truth) / allowed


def _distance(got: Tensor, truth: Tensor) -> float:
    return float((got.detach().double() - truth.detach()).abs().max())


def tensor(shape: Sequence[int], *, channels_last: bool = False, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(*shape).to(dtype)
    return x.to(memory_format=torch.channels_last) if channels_last else x
