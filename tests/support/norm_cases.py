"""The norm layers with arguments and an input shape each: what the tests of every layer run over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normwise
from support.foreign_norms import LayerNorm1P


@dataclass(frozen=True)
class Case:
    """One setting of one layer, ours and torch's."""

    name: str
    args: tuple[Any, ...]
    shape: tuple[int, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    count: int = 1  # elements that share statistics
    options: dict[str, Any] = field(default_factory=dict)  # of ours alone
    truth: Callable[..., nn.Module] | None = None  # what computes the same, where torch.nn's namesake does not

    def ours(self, **more: Any) -> nn.Module:
        return getattr(normwise, self.name)(*self.args, **self.kwargs, **self.options, **more)

    def theirs(self, **more: Any) -> nn.Module:
        return (self.truth or getattr(nn, self.name))(*self.args, **self.kwargs, **more)

    def __str__(self) -> str:
        kwargs = ",".join(f"{k}={v}" for k, v in {**self.kwargs, **self.options}.items())
        return f"{self.name}{self.args}[{kwargs}]{self.shape}".replace(" ", "")


class RMSNorm1P(nn.RMSNorm):
    """By weight + 1."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, self.normalized_shape, self.weight + 1, self.eps)


CASES = [
    Case("BatchNorm1d", (5,), (7, 5), count=7),
    Case("BatchNorm1d", (5,), (3, 5, 4), count=12),
    Case("BatchNorm1d", (5,), (7, 5), {"momentum": None}, count=7),
    Case("BatchNorm1d", (5,), (7, 5), {"affine": False}, count=7),
    Case("BatchNorm1d", (5,), (7, 5), {"track_running_stats": False}, count=7),
    Case("BatchNorm2d", (4,), (3, 4, 5, 6), {"eps": 1e-3, "momentum": 0.3}, count=90),
    Case("BatchNorm2d", (3,), (1, 3, 5, 6), count=30),
    Case("BatchNorm3d", (4,), (2, 4, 3, 2, 5), count=60),
    Case("LayerNorm", (8,), (6, 8), count=8),
    Case("LayerNorm", ((3, 5),), (2, 4, 3, 5), count=15),
    Case("LayerNorm", (8,), (1, 8), {"bias": False}, count=8),
    Case("LayerNorm", (8,), (2, 3, 8), {"elementwise_affine": False}, count=8),
    Case("RMSNorm", (8,), (6, 8), count=8),
    Case("RMSNorm", ((3, 5),), (2, 4, 3, 5), {"eps": 1e-4}, count=15),
    Case("RMSNorm", (8,), (2, 3, 8), {"elementwise_affine": False}, count=8),
    Case("LayerNorm", (8,), (6, 8), count=8, options={"offset": 1.0}, truth=LayerNorm1P),
    Case("RMSNorm", (8,), (2, 3, 8), {"eps": 1e-4}, count=8, options={"offset": 1.0}, truth=RMSNorm1P),
    Case("GroupNorm", (2, 6), (3, 6, 4), count=12),
    Case("GroupNorm", (3, 6), (2, 6, 4, 5), {"affine": False}, count=40),
    Case("GroupNorm", (1, 4), (1, 4), count=4),
    Case("InstanceNorm1d", (4,), (3, 4, 6), count=6),
    Case("InstanceNorm1d", (4,), (4, 6), {"affine": True}, count=6),
    Case("InstanceNorm2d", (4,), (3, 4, 5, 6), {"affine": True, "track_running_stats": True}, count=30),
    Case("InstanceNorm3d", (2,), (2, 2, 3, 4, 2), {"track_running_stats": True, "momentum": 0.4}, count=24),
]

# In float32 torch.nn's. In half precision they round twice, which is no worse, but another number: not held to torch's.
ROUNDED_BEFORE_GAIN = [
    Case("LayerNorm", (8,), (6, 8), count=8, options={"cast": "input"}),
    Case("RMSNorm", ((3, 5),), (2, 4, 3, 5), count=15, options={"cast": "input"}),
    Case("RMSNorm", (8,), (2, 3, 8), count=8, options={"offset": 1.0, "cast": "input"}, truth=RMSNorm1P),
]

each_case = pytest.mark.parametrize("case", CASES, ids=str)
each_case_of_ours = pytest.mark.parametrize("case", [*CASES, *ROUNDED_BEFORE_GAIN], ids=str)


def with_bias_argument(theirs: Callable[..., nn.Module]) -> bool:
    """Whether this version's torch.nn layer takes `bias=` (BatchNorm, GroupNorm and InstanceNorm do since 2.13)."""
    import inspect

    return "bias" in inspect.signature(theirs.__init__).parameters


def randomize(layer: nn.Module) -> nn.Module:
    """Gain, bias and running statistics that a forgotten or exchanged one would show."""
    with torch.no_grad():
        for name, t in layer.named_parameters():
            t.copy_(torch.randn_like(t) + (1 if name == "weight" else 0))
        for name, t in layer.named_buffers():
            if name == "running_var":
                t.copy_(torch.rand_like(t) + 0.5)
            elif name == "running_mean":
                t.copy_(torch.randn_like(t))
    return layer


def run(layer: nn.Module, x: Tensor, upstream: Tensor, **kwargs: Any) -> dict[str, Tensor]:
    """Output, gradients for a given upstream gradient, and the state's buffers after the call."""
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = layer(leaf, **kwargs)
    parameters = dict(layer.named_parameters())
    grads = torch.autograd.grad(y, [leaf, *parameters.values()], upstream)
    return {
        "output": y.detach(),
        "grad input": grads[0],
        **{f"grad {n}": g for n, g in zip(parameters, grads[1:], strict=True)},
        **{n: b.clone() for n, b in layer.named_buffers() if n in layer.state_dict()},
    }


def added(layer: nn.Module, r: Any) -> dict[str, Any]:
    """The argument by which a layer takes a residual: LayerNorm and RMSNorm add it before they normalize."""
    return {"add" if isinstance(layer, (nn.LayerNorm, nn.RMSNorm)) else "residual": r}
