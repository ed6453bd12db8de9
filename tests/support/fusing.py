"""What tests of `fuse` share: runs in float64, where nothing but the wiring can differ."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

import normwise
from normwise.surgery import Report
from support.surgery_models import randomized
from support.tolerances import assert_close


def doubled(value: Any) -> Any:
    return value.double() if value.is_floating_point() else value


def run(model: nn.Module, inputs: tuple[Tensor, ...], *, training: bool, seed: int = 0) -> dict[str, Tensor]:
    """Output, gradients of inputs and parameters, and buffers afterwards, of a copy in float64."""
    twin = copy.deepcopy(model).double().train(training)
    given = tuple(doubled(t.detach().clone()) for t in inputs)
    leaves = [t.requires_grad_() for t in given if t.is_floating_point()]
    torch.manual_seed(seed)
    output = twin(*(t * 1 if t.is_floating_point() else t for t in given))
    parts = [output] if isinstance(output, Tensor) else [t for t in output if isinstance(t, Tensor)]
    upstream = [
        torch.randn(t.shape, generator=torch.Generator().manual_seed(n), dtype=t.dtype) for n, t in enumerate(parts)
    ]
    torch.autograd.backward(parts, upstream)
    found = {f"output {n}": t.detach() for n, t in enumerate(parts)}
    found |= {f"input {n}": t.grad for n, t in enumerate(leaves) if t.grad is not None}
    found |= {f"grad {name}": p.grad for name, p in twin.named_parameters() if p.grad is not None}
    return found | {f"buffer {name}": b for name, b in twin.named_buffers()}


def assert_same_runs(new: nn.Module, old: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    for training in (False, True):
        a, b = (run(model, inputs, training=training) for model in (new, old))
        assert a.keys() == b.keys()
        largest = max(float(t.abs().max()) for name, t in b.items() if name.startswith("grad"))
        for name, expected in b.items():
            if not expected.is_floating_point():
                assert torch.equal(a[name], expected), name
                continue
            scale = max(largest, 1.0) if name.startswith("grad") else max(float(expected.abs().max()), 1.0)
            assert_close(a[name], expected, kind="composed", scale=scale, count=1000)


def fused(model: nn.Module, *inputs: Tensor, example: bool = False, **options: Any) -> tuple[nn.Module, Report]:
    """The model fused, after a proof that it computes the same and holds the same."""
    randomized(model)
    before = {name: (type(module), module) for name, module in model.named_modules()}
    new, report = normwise.fuse(model, example=inputs if example else None, **options)
    assert list(new.state_dict()) == list(model.state_dict())
    assert {name: (type(module), module) for name, module in model.named_modules()} == before
    assert_same_runs(new, model, inputs)
    return new, report


def reason(report: Report, name: str) -> str:
    (found,) = [skip.reason for skip in report.skipped if skip.name == name]
    return found


def done(report: Report) -> dict[str, str]:
    """By the name of each norm that was fused what one call computes now."""
    return {change.name: change.after.removeprefix("one call: ") for change in report.changed}
