"""What normwise.Monitor costs: `STEPS` training steps, one of them looked at, against as many without a monitor.

At every=100, where it may cost 5 % of the steps, a look may cost as much as five of them: so the ratio of these few
steps may be 1 + 5 / STEPS, and the 95 others, on which the monitor does nothing but count, are not waited for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import normwise
from benchmarks.case import Case

STEPS = 5
MUST = 1 + 0.05 * 100 / STEPS


class Nowhere:
    """A writer that keeps nothing: the cost of writing a file is the writer's."""

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        pass

    def add_histogram(self, tag: str, values: Tensor, step: int) -> None:
        pass


class LastState(nn.Module):
    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer, self.linear = layer, nn.Linear(layer.hidden_size, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(self.layer(x)[0][-1])
        return out


def conv_net() -> nn.Sequential:
    net, channels = nn.Sequential(), 3
    for width in (32, 32, 64, 64):
        net.extend([nn.Conv2d(channels, width, 3, padding=1, bias=False), normwise.BatchNorm2d(width), nn.ReLU()])
        channels = width
    return net.extend([nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10)])


def mlp() -> nn.Sequential:
    net = nn.Sequential()
    for _ in range(4):
        net.extend([nn.Linear(512, 512), normwise.LayerNorm(512), nn.ReLU()])
    return net.append(nn.Linear(512, 10))


def cases() -> Iterator[Case]:
    yield _case("conv net, 4 x BatchNorm, 32 x 3 x 32 x 32", conv_net(), torch.randn(32, 3, 32, 32))
    yield _case("MLP, 4 x LayerNorm, 128 x 512", mlp(), torch.randn(128, 512))
    yield _case("nn.LSTM, 50 steps x 32 x 128, 256 units", LastState(nn.LSTM(128, 256)), torch.randn(50, 32, 128))
    yield _case("normwise.LSTM, the same", LastState(normwise.LSTM(128, 256)), torch.randn(50, 32, 128))


def _case(name: str, model: nn.Module, x: Tensor) -> Case:
    target = torch.randint(10, (x.shape[1] if x.dim() == 3 else len(x),))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def train(monitor: normwise.Monitor | None) -> None:
        for _ in range(STEPS):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), target).backward()
            optimizer.step()
            if monitor is not None:
                monitor.step()

    def with_monitor() -> None:
        with normwise.Monitor(model, Nowhere(), every=STEPS) as monitor:
            train(monitor)

    return Case(name, with_monitor, lambda: train(None), "the same steps alone", lambda: 0.0, must=MUST)
