"""Models that call their norm with more than its input: scale and shift, a gate, segments, a domain."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import normwise

INPUTS, FEATURES, CLASSES, ROWS, BATCHES = 8, 16, 3, 32, 6


class Net(nn.Module):
    """Linear, norm, ReLU, linear; the norm is called with what `more` makes of the second input."""

    def __init__(self, norm: nn.Module, more: Callable[[Net, Any], dict[str, Any]], bias: bool = True) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(INPUTS, FEATURES, bias=bias), norm, nn.Linear(FEATURES, CLASSES)
        self.embed = nn.Linear(4, 2 * FEATURES)
        self.more = more

    def forward(self, x: Tensor, what: Any) -> Tensor:
        y: Tensor = self.last(torch.relu(self.norm(self.first(x), **self.more(self, what))))
        return y


def scale_and_shift(net: Net, condition: Tensor) -> dict[str, Any]:
    scale, shift = net.embed(condition).chunk(2, -1)
    return {"scale": scale, "shift": shift}


def gate(net: Net, condition: Tensor) -> dict[str, Any]:
    return {"gate": net.embed(condition)[:, :FEATURES]}


def segments(net: Net, numbers: Tensor) -> dict[str, Any]:
    return {"segments": numbers}


def domain(net: Net, number: Any) -> dict[str, Any]:
    return {"domain": number}


def batches(second: Callable[[int], Any]) -> list[Any]:
    """Batches ((x, second(number of the batch)), target)."""
    return [((torch.randn(ROWS, INPUTS), second(n)), torch.randint(CLASSES, (ROWS,))) for n in range(BATCHES)]


def of_conditions() -> list[Any]:
    return batches(lambda n: torch.randn(ROWS, 4))


def of_segments(rows: int = ROWS // 2) -> list[Any]:
    """Each batch has segments of so many rows."""
    return batches(lambda n: torch.arange(ROWS) // rows)


def of_domains(mixed: bool = False) -> list[Any]:
    return batches(lambda n: torch.arange(ROWS) % 2 if mixed else n % 2)


def trained(net: nn.Module, data: list[Any], steps: int = 40) -> nn.Module:
    optimizer = torch.optim.SGD(net.parameters(), 0.05)
    for n in range(steps):
        given, target = data[n % len(data)]
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(*given), target).backward()
        optimizer.step()
    return net


class Normed(nn.Module):
    """An input norm that has seen something."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.norm, self.last = normwise.RunningNorm(INPUTS, **options), nn.Linear(INPUTS, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.norm(x))
        return y
