"""What a model computes on its user's example, before and after its norms were fused."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from normwise.measure.snapshot import dry_run
from normwise.surgery.batches import call_example

# By which share of the largest element results may differ: of float64 a deep model loses a few digits, and what is
# wired wrongly all of them. Where a model runs in its own dtype only, it is its rounding in a deep model that counts.
_ALLOWED = {torch.float64: 1e-8, torch.float32: 1e-2}
_GRADIENT = "the gradient of "


class Results(NamedTuple):
    """By name what a model gives in evaluation and in training; None of a mode in which it does not run."""

    values: dict[str, Tensor]
    exact: bool


def results(model: nn.Module, example: Any) -> Results:
    """Outputs, gradients of inputs and parameters, and buffers afterwards, in evaluation and in training: of a copy in
    float64, or of the model itself where that does not work. The model is as it was afterwards."""
    try:
        twin = copy.deepcopy(model).double()
        return Results(dict(_all(twin, _doubled(example))), True)
    except Exception:  # copies or float64 do not work for every model
        return Results(dict(_all(model, example)), False)


def _all(model: nn.Module, example: Any) -> Iterator[tuple[str, Tensor]]:
    for training in (False, True):
        mode = "training" if training else "evaluation"
        with dry_run(model, training=training):
            torch.manual_seed(0)
            inputs = _fresh(example)
            try:
                with torch.enable_grad():
                    output = call_example(model, inputs)
            except Exception:
                if not training:
                    raise
                continue  # a batch of one sample, say: then evaluation has to do
            outputs = [t for t in tensors(output) if t.is_floating_point()]
            for n, value in enumerate(outputs):
                yield f"output {n} in {mode}", value.detach().clone()
            wanted: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
            wanted |= {f"input {n}": t for n, t in enumerate(tensors(inputs)) if t.requires_grad}
            learning = [t for t in outputs if t.requires_grad]
            if learning and wanted:
                generator = torch.Generator().manual_seed(1)
                upstream = [torch.randn(t.shape, generator=generator).to(t) for t in learning]
                try:
                    found = torch.autograd.grad(learning, list(wanted.values()), upstream, allow_unused=True)
                except RuntimeError:
                    if training:
                        raise
                    continue  # a forward that differentiates may leave no graph in evaluation
                for name, gradient in zip(wanted, found, strict=True):
                    if gradient is not None:
                        yield f"{_GRADIENT}{name} in {mode}", gradient
            for name, buffer in model.named_buffers():
                if buffer.is_floating_point():
                    yield f"{name} after {mode}", buffer.detach().clone()


def difference(before: Results, after: Results) -> tuple[str, float]:
    """What differs by more than rounding and by how much, ("", the largest difference) if nothing does."""
    dtype = torch.float64 if before.exact and after.exact else torch.float32
    # A gradient may be 0 but for rounding (that of a bias before a BatchNorm), and so may a running mean: they are
    # measured by the largest of their kind.
    largest: dict[str, float] = {}
    for name, t in before.values.items():
        largest[_kind(name)] = max(largest.get(_kind(name), 0.0), _size(t))
    worst = 0.0
    for name in {**before.values, **after.values}:
        a, b = before.values.get(name), after.values.get(name)
        if a is None or b is None or a.dtype != b.dtype or a.shape != b.shape:
            return name, float("inf")
        apart = _size(a.double() - b.double()) / max(largest[_kind(name)], 1e-30)
        if not apart <= _ALLOWED[dtype]:
            return name, apart
        worst = max(worst, apart)
    return "", worst


def _kind(name: str) -> str:
    return _GRADIENT if name.startswith(_GRADIENT) else name if name.startswith("output") else "buffer"


def _size(t: Tensor) -> float:
    return float(t.abs().max()) if t.numel() else 0.0


def tensors(value: Any) -> list[Tensor]:
    """The tensors in tuples, lists, mappings and objects with attributes of their own."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [t for part in value.values() for t in tensors(part)]
    if isinstance(value, (tuple, list)):
        return [t for part in value for t in tensors(part)]
    return [t for part in vars(value).values() for t in tensors(part)] if hasattr(value, "__dataclass_fields__") else []


def _fresh(value: Any) -> Any:
    """The example with tensors of its own, of which gradients are wanted."""
    if isinstance(value, Tensor):
        own = value.detach().clone()
        return own.requires_grad_() if own.is_floating_point() else own
    if isinstance(value, Mapping):
        return {name: _fresh(part) for name, part in value.items()}
    return type(value)(map(_fresh, value)) if type(value) in (tuple, list) else value


def _doubled(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {name: _doubled(part) for name, part in value.items()}
    return type(value)(map(_doubled, value)) if type(value) in (tuple, list) else value
