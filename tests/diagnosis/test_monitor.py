"""The monitor writes the numbers of every so many steps, and is not there in between."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import normwise
from normwise.diagnosis import DiagnosisError

cross_entropy = nn.functional.cross_entropy


class Writer:
    """Keeps what it is given, as a SummaryWriter would."""

    def __init__(self) -> None:
        self.scalars: dict[str, list[tuple[int, float]]] = {}
        self.histograms: dict[str, list[tuple[int, Tensor]]] = {}

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.scalars.setdefault(tag, []).append((step, value))

    def add_histogram(self, tag: str, values: Tensor, step: int) -> None:
        self.histograms.setdefault(tag, []).append((step, values))


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Sigmoid(), nn.Linear(8, 3))


def train(model: nn.Module, monitor: Any, steps: int, x: Tensor, target: Tensor) -> list[Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    outputs = []
    for _ in range(steps):
        optimizer.zero_grad()
        outputs.append(model(x).detach())
        cross_entropy(model(x), target).backward()
        optimizer.step()
        if monitor is not None:
            monitor.step()
    return outputs


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_writes_every_so_many_steps():
    model, writer, x, target = net(), Writer(), torch.randn(20, 6), torch.randint(3, (20,))
    monitor = normwise.Monitor(model, writer, every=4)
    train(model, monitor, 10, x, target)
    assert [step for step, _ in writer.scalars["normwise/1/std"]] == [0, 4, 8]
    assert {
        "normwise/1/running/distance",
        "normwise/2/saturated",
        "normwise/0/gradient/weight",
    } <= writer.scalars.keys()
    assert [step for step, _ in writer.histograms["normwise/1/gain"]] == [0, 4, 8]
    # The running statistics come nearer to the batch's, which is always the same.
    distances = [value for _, value in writer.scalars["normwise/1/running/distance"]]
    assert distances[0] > distances[-1]


def test_the_numbers_are_those_of_the_step():
    model, writer, x, target = net(), Writer(), torch.randn(20, 6), torch.randint(3, (20,))
    with normwise.Monitor(model, writer) as monitor:
        hidden = model[0](x).detach()
        writer_was = dict(writer.scalars)
        monitor.close()
    assert writer_was == {}
    with normwise.Monitor(model, writer) as monitor:
        cross_entropy(model(x), target).backward()
        gradient = model[3].weight.grad.norm()
        monitor.step()
    assert writer.scalars["normwise/0/mean"][0][1] == pytest.approx(float(hidden.mean()), abs=1e-6)
    assert writer.scalars["normwise/0/std"][0][1] == pytest.approx(float(hidden.std(correction=0)), rel=1e-5)
    assert writer.scalars["normwise/3/gradient/weight"][0][1] == pytest.approx(float(gradient), rel=1e-5)


def test_training_is_the_same_with_it():
    x, target = torch.randn(20, 6), torch.randint(3, (20,))
    plain, watched = net(), net()
    watched.load_state_dict(plain.state_dict())
    expected = train(plain, None, 5, x, target)
    found = train(watched, normwise.Monitor(watched, Writer(), every=2), 5, x, target)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(watched.buffers(), plain.buffers(), strict=True))


def test_no_hook_between_the_looks_nor_after_closing():
    model, x, target = net(), torch.randn(20, 6), torch.randint(3, (20,))
    with normwise.Monitor(model, Writer(), every=3) as monitor:
        assert hooks(model) > 0
        train(model, monitor, 1, x, target)
        assert hooks(model) == 0
        train(model, monitor, 2, x, target)
        assert hooks(model) > 0
    assert hooks(model) == 0


def test_eval_passes_do_not_count():
    model, writer, x, target = net(), Writer(), torch.randn(20, 6), torch.randint(3, (20,))
    monitor = normwise.Monitor(model, writer)
    model.eval()
    model(x * 1000)
    model.train()
    train(model, monitor, 1, x, target)
    assert writer.scalars["normwise/0/std"][0][1] < 10


def test_gates_and_a_writer_of_scalars_alone():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.linear = normwise.LSTM(6, 5, batch_first=True), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.lstm(x)[0][:, -1])

    class Scalars:
        tags: ClassVar[set[str]] = set()

        def add_scalar(self, tag: str, value: float, step: int) -> None:
            self.tags.add(tag)

    model = Net()
    train(model, normwise.Monitor(model, Scalars()), 1, torch.randn(8, 7, 6), torch.randint(3, (8,)))
    assert {"normwise/lstm/l0/saturated/f", "normwise/lstm/l0/summed/last"} <= Scalars.tags


def test_what_does_not_fit_is_refused():
    for every in (0, -3, True, 1.5):
        with pytest.raises(DiagnosisError, match="every must be a positive integer"):
            normwise.Monitor(net(), Writer(), every=every)
    with pytest.raises(DiagnosisError, match=r"writer must have add_scalar\(tag, value, step\).*got str"):
        normwise.Monitor(net(), "runs/1")
    with pytest.raises(DiagnosisError, match="compiled model"):
        normwise.Monitor(torch.compile(net(), backend="eager"), Writer())
