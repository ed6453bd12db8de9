"""The monitor writes the numbers of every so many steps, and is not there in between."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import normwise
from normwise.diagnosis import DiagnosisError
from normwise.diagnosis.records import Finding
from normwise.integrations import TrainingHook

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


def test_its_repr_says_where_it_is():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    monitor = normwise.Monitor(model, every=3)
    assert repr(monitor) == "<Monitor of Sequential, every=3: 0 steps done, looks at the next one; no findings>"
    monitor.step()
    assert repr(monitor) == "<Monitor of Sequential, every=3: 1 step done, looks again in 2 steps; no findings>"
    monitor.step()
    code = dict.fromkeys(("severity", "title", "evidence", "cause", "cure", "claims"), "")
    monitor.findings = [Finding(code=f"NW{n:03}", layer="0", **code) for n in (*range(1, 18), 1)]
    assert repr(monitor) == (
        "<Monitor of Sequential, every=3: 2 steps done, looks again in 1 step; 18 findings (NW001, NW002, NW003, "
        "NW004, NW005, ...)>"
    )
    assert repr(TrainingHook(model, every=3)).startswith(
        "<TrainingHook of Sequential: <Monitor of Sequential, every=3: "
    )
    assert len(repr(monitor)) < 200
    monitor.close()


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


def test_a_healthy_training_raises_nothing():
    """From the first step on: running statistics that are still near their start are not judged."""
    model, x, target = net(), torch.randn(64, 6) * 5 + 3, torch.randint(3, (64,))
    monitor = normwise.Monitor(model, every=1)
    train(model, monitor, 60, x, target)
    assert monitor.findings == []


@pytest.mark.parametrize(("batches", "found"), [(28, []), (29, ["NW002"])])
def test_running_statistics_are_judged_once_their_start_is_gone(batches, found):
    """0.9^29 is the first below 5 %."""
    model = net()
    model[1].num_batches_tracked.fill_(batches)
    monitor = normwise.Monitor(model)
    cross_entropy(model(torch.randn(64, 6) * 99 + 99), torch.randint(3, (64,))).backward()
    monitor.step()
    assert [finding.code for finding in monitor.findings] == found


def test_a_gradient_that_is_not_finite():
    model, x, target = net(), torch.randn(20, 6), torch.randint(3, (20,))
    monitor = normwise.Monitor(model, every=1, ignore=["NW003"])
    train(model, monitor, 1, x, target)
    with torch.no_grad():
        model[3].weight[0, 0] = math.inf
    train(model, monitor, 1, x, target)
    (finding,) = [finding for finding in monitor.findings if finding.code == "NW017"]
    assert finding.layer == "3"
    assert "gradients of" in finding.cause


def test_what_cannot_be_seen_in_a_step_is_not_said():
    """Norms of unknown classes, and a stack that has them: NW014 would say that there is no norm."""

    class MyNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(8))

        def forward(self, x: Tensor) -> Tensor:
            return torch.sin(x) * self.gain

    layers = [layer for _ in range(10) for layer in (nn.Linear(8, 8), MyNorm())]
    model = nn.Sequential(*layers, nn.Linear(8, 3))
    with torch.no_grad():
        for layer in model:
            if isinstance(layer, nn.Linear):
                layer.weight.mul_(0.3)
    monitor = normwise.Monitor(model, ignore=["NW013"])
    train(model, monitor, 1, torch.randn(20, 8), torch.randint(3, (20,)))
    assert monitor.findings == []


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def compiled_by(how: str, backend: Any) -> tuple[nn.Module, nn.Module]:
    """(what is called, the eager model inside)."""
    model = Net()
    if how == "outside":
        return torch.compile(model, backend=backend), model
    if how == "in place":
        model.compile(backend=backend)
    else:
        model.net[3] = torch.compile(model.net[3], backend=backend)
    return model, model


# Of the compiler, which asks each tensor for its gradient.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("how", ["outside", "in place", "in part"])
def test_a_compiled_model_is_looked_at_eagerly_and_compiled_once(how):
    graphs, runs = [], []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return lambda *args: runs.append(1) or graph.forward(*args)

    torch._dynamo.reset()
    called, inner = compiled_by(how, backend)
    plain, x, target = Net(), torch.randn(20, 6), torch.randint(3, (20,))
    with torch.no_grad():
        for own, other in zip(plain.parameters(), inner.parameters(), strict=True):
            own.copy_(other)
    writers = [Writer(), Writer()]
    for model, writer in zip((called, plain), writers, strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        monitor = normwise.Monitor(model, writer, every=3)
        for _ in range(7):
            optimizer.zero_grad()
            cross_entropy(model(x), target).backward()
            optimizer.step()
            monitor.step()
        monitor.close()
    assert (len(graphs), len(runs)) == (1, 4)  # of 7 steps, 3 were looked at
    found, expected = (
        {tag.replace("._orig_mod", ""): values for tag, values in writer.scalars.items()} for writer in writers
    )
    assert found.keys() == expected.keys()
    for tag, values in expected.items():
        assert [step for step, _ in found[tag]] == [step for step, _ in values] == [0, 3, 6]
        assert [value for _, value in found[tag]] == pytest.approx([value for _, value in values], rel=1e-4, abs=1e-6)


def test_gradients_without_the_factor_of_a_scaler():
    writers = []
    for scale in (1.0, 1024.0):
        torch.manual_seed(0)
        model, writer, x, target = net(), Writer(), torch.randn(20, 6), torch.randint(3, (20,))
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with normwise.Monitor(model, writer, scaler=scaler) as monitor:
            scaler.scale(cross_entropy(model(x), target)).backward()
            scaler.step(optimizer)
            monitor.step()
        writers.append(writer)
    for tag in ("normwise/0/gradient", "normwise/0/gradient/weight", "normwise/1/gradient"):
        assert writers[0].scalars[tag][0][1] == pytest.approx(writers[1].scalars[tag][0][1], rel=1e-5)


def test_micro_batches_are_one_step():
    model, writer, x, target = net(), Writer(), torch.randn(20, 6), torch.randint(3, (20,))
    with normwise.Monitor(model, writer) as monitor:
        for part in (slice(0, 10), slice(10, 20)):
            (cross_entropy(model(x[part]), target[part]) / 2).backward()
        look = monitor.step()
    assert {layer.calls for layer in look.layers} == {2}
    assert look.scalars["normwise/0/mean"] == pytest.approx(float(model[0](x).detach().mean()), abs=1e-6)
    expected = float(model[3].weight.grad.norm())
    assert look.scalars["normwise/3/gradient/weight"] == pytest.approx(expected, rel=1e-5)
