"""Whether two layers compute the same: on inputs made to tell norms apart, or on those of a user's model."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from normwise.surgery.norms.forms import own_tensors, takes_gate

# Float32 rounds by 6e-8 a step; a biased variance differs from an unbiased one by 2e-5 in rows of 25,000 features.
CLOSE, GRADIENTS_CLOSE = 2e-5, 2e-4
# In half precision rounding before the gain changes a third of the results, another order of float32 sums a few in a
# million.
FEW = 0.001
# Root mean squares of rows or channels: large ones for the statistics, those around the usual eps for eps.
_SIZES = (1.0, 3.0, 0.3, 0.03, 3e-3, 1e-3, 1e-4, 1e-6)


class Call(NamedTuple):
    """What a layer is called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Result(NamedTuple):
    """What a call gives: the output, and the gradients of the tensors of the call and of the layer's parameters."""

    output: Tensor
    of_inputs: list[Tensor | None]
    of_parameters: dict[str, Tensor | None]


def twin(layer: nn.Module) -> nn.Module:
    """A copy of the layer with its forward, without its hooks, whose tensors are its own and learn, in any mode."""
    new = copy.deepcopy(layer)
    for module in new.modules():
        vars(module).pop("train", None)  # of a layer that `freeze` keeps in evaluation
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            getattr(module, name).clear()
    return new.requires_grad_(True)


@torch.no_grad()
def randomize(layer: nn.Module, generator: torch.Generator) -> None:
    """Draw gains and biases, since 0 and 1 hide what a layer does with them, and statistics that fit no batch."""
    for name, tensor in own_tensors(layer).items():
        values = torch.rand(tensor.shape, generator=generator) + 0.5
        if "var" not in name:
            values = values * torch.where(torch.rand(tensor.shape, generator=generator) < 0.5, -1.0, 1.0)
        tensor.copy_(values)


def generated(layer: nn.Module, features: int, generator: torch.Generator) -> Iterator[tuple[Call, bool]]:
    """Calls in float32 with the features on the last axis or on axis 1, and whether their gradients tell anything:
    where rows next to eps drown the others they do not."""
    a, b, c = [size for size in (3, 5, 4, 7) if size != features][:3]
    last = [(9, features), (a, b, features), (a, b, c, features)]
    volumes = [(a, features, 2, b, c)] if layer._buffers else []
    for n, shape in enumerate([*last, (a, features, b), (a, features, b, c), *volumes]):
        axis = len(shape) - 1 if shape in last else 1
        # Of both signs in sum, should a forward ask.
        x = (torch.randn(shape, generator=generator) + (-0.5 if n % 2 else 0.5)).to(device_of(layer))
        rows = torch.Size(1 if at == axis else size for at, size in enumerate(shape))
        channels = torch.Size(size if at == axis else 1 for at, size in enumerate(shape))
        yield _call(layer, x, generator), True
        yield _call(layer, x * _sizes(rows).to(x.device), generator), False
        yield _call(layer, -x * _sizes(channels).to(x.device), generator), False


def _sizes(shape: torch.Size) -> Tensor:
    return torch.tensor(list(itertools.islice(itertools.cycle(_SIZES), shape.numel()))).view(shape)


def _call(layer: nn.Module, x: Tensor, generator: torch.Generator) -> Call:
    gate = (torch.randn(x.shape, generator=generator).to(x.device),) if takes_gate(layer) else ()
    return Call((x, *gate), {})


def device_of(layer: nn.Module) -> torch.device:
    """Where the layer's tensors are; the CPU for a layer without any."""
    return next((t.device for t in (*layer.parameters(), *layer.buffers())), torch.device("cpu"))


def in_dtype(call: Call, dtype: torch.dtype) -> Call:
    """The call with floating tensors of this dtype."""

    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return Call(tuple(map(cast, call.args)), {name: cast(value) for name, value in call.kwargs.items()})


def result(layer: nn.Module, call: Call, *, gradients: bool) -> Result:
    """What the layer gives for a call, whose tensors stay as they are; random numbers and upstream gradients are the
    same for every layer.

    Raises:
        ValueError: it returns something else than a floating tensor of the shape of its input, or overwrites its input.
    """
    given: list[Tensor] = []

    def fresh(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value.detach().clone()
        if value.is_floating_point():
            given.append(value.requires_grad_(gradients))
        return value

    args, kwargs = tuple(map(fresh, call.args)), {name: fresh(value) for name, value in call.kwargs.items()}
    parameters = {name: p for name, p in layer.named_parameters() if p.requires_grad} if gradients else {}
    with torch.random.fork_rng(devices=[]), torch.set_grad_enabled(gradients):
        torch.manual_seed(0)
        if gradients:  # so that a layer that works in place finds no leaf
            args = tuple(a * 1 if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
        x = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
        output = layer(*args, **kwargs)
        if not isinstance(output, Tensor) or x is None or output.shape != x.shape or not output.is_floating_point():
            raise ValueError("it does not return a tensor of the shape of its input")
        if not torch.equal(x.detach(), given[0].detach()):
            raise ValueError("it overwrites its input")
        if not gradients:
            return Result(output, [], {})
        upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
        wanted = [*given, *parameters.values()]
        grads = torch.autograd.grad(output, wanted, upstream, allow_unused=True)
    return Result(output.detach(), [*grads[: len(given)]], dict(zip(parameters, grads[len(given) :], strict=True)))


def same_output(a: Tensor, b: Tensor) -> bool:
    """Equal up to float32's rounding, or of half precision all but a few bits."""
    if a.dtype != b.dtype:
        return False
    if a.dtype in (torch.float32, torch.float64):
        return bool(torch.isclose(a, b, rtol=CLOSE, atol=CLOSE, equal_nan=True).all())
    return different(a, b) <= FEW


def different(a: Tensor, b: Tensor) -> float:
    """The share of elements that are not the same to the last bit."""
    return float(((a != b) & ~(a.isnan() & b.isnan())).double().mean())


def distance(a: Tensor | None, b: Tensor | None) -> float:
    """The largest difference of two gradients, as a share of the largest element."""
    if a is None or b is None:
        return 0.0 if a is b or not bool((a if b is None else b).any()) else float("inf")  # type: ignore[union-attr]
    if a.numel() != b.numel():
        return float("inf")
    a, b = a.double().flatten(), b.double().flatten()
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) if a.numel() else 0.0
