"""The hook for loops without a trainer: looks, findings, and running statistics for an evaluation."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import normwise
from normwise.diagnosis import DiagnosisError
from normwise.integrations import Look, Recalibrate, TrainingHook
from support.on_ranks import on_ranks

cross_entropy = nn.functional.cross_entropy


class Kept:
    """A logger that keeps what it is given."""

    def __init__(self) -> None:
        self.looks: list[Look] = []

    def log(self, look: Look) -> None:
        self.looks.append(look)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def data(samples: int = 64) -> TensorDataset:
    return TensorDataset(torch.randn(samples, 6) * 3 + 1, torch.randint(3, (samples,)))


def train(model: nn.Module, loader: Any, hook: TrainingHook | None = None, epochs: int = 1) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(epochs):
        model.train()
        for x, target in loader:
            optimizer.zero_grad()
            cross_entropy(model(x), target).backward()
            optimizer.step()
            if hook is not None:
                hook.step()
        if hook is not None:
            with hook.evaluation(loader):
                model.eval()
                model(x)


def buffers(model: nn.Module) -> list[Tensor]:
    return [buffer.clone() for buffer in model.buffers()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_training_is_the_same_with_it_to_the_bit_recalibration_included():
    """Shuffling draws from torch's random state, which a walk over the loader would move."""
    alone, watched, dataset = net(), net(), data()
    watched.load_state_dict(alone.state_dict())
    for model, with_hook in ((alone, False), (watched, True)):
        torch.manual_seed(0)
        loader = DataLoader(dataset, 16, shuffle=True)
        hook = TrainingHook(model, every=2, recalibrate=True) if with_hook else None
        train(model, loader, hook, epochs=3)
        last = torch.rand(1)
        if hook is None:
            expected = last
    assert same(list(watched.state_dict().values()), list(alone.state_dict().values()))
    assert torch.equal(last, expected)


@pytest.mark.parametrize("keep", [False, True])
def test_an_evaluation_has_the_statistics_of_the_train_data(keep):
    model, dataset = net(), data()
    loader = DataLoader(dataset, 16)
    hook = TrainingHook(model, recalibrate=Recalibrate(batches=3, keep=keep))
    before = buffers(model)
    with hook.evaluation(loader):
        hidden = model[0](dataset.tensors[0][:48]).detach()
        torch.testing.assert_close(model[1].running_mean, hidden.mean(0))
        torch.testing.assert_close(model[1].running_var, hidden.var(0))
        inside = buffers(model)
    assert same(buffers(model), inside if keep else before)


def test_batches_of_ones_own_and_a_forward_for_them():
    model, x = net(), torch.randn(40, 6)
    settings = Recalibrate(batches=[{"image": x}], forward=lambda model, batch: model(batch["image"]), exact=True)
    with TrainingHook(model, recalibrate=settings).evaluation():
        torch.testing.assert_close(model[1].running_mean, model[0](x).detach().mean(0))


def test_without_recalibrate_an_evaluation_leaves_statistics_alone():
    model = net()
    before = buffers(model)
    hook = TrainingHook(model)
    with hook.evaluation():
        assert hooks(model) == 0
        assert same(buffers(model), before)
    assert hooks(model) > 0
    hook.close()
    assert hooks(model) == 0


def test_after_averaging_the_statistics_stay():
    averaged, dataset = torch.optim.swa_utils.AveragedModel(net()), data()
    model = averaged.module
    hook = TrainingHook(model, recalibrate=Recalibrate(before_validation=False, at_end=True))
    before = buffers(model)
    with hook.evaluation(DataLoader(dataset, 16)):
        assert same(buffers(model), before)
    report = hook.end(DataLoader(dataset, 16))
    assert [change.name for change in report.changed] == ["1"]
    torch.testing.assert_close(model[1].running_mean, model[0](dataset.tensors[0]).detach().mean(0))
    assert hooks(model) == 0
    assert TrainingHook(net()).end() is None


def test_an_error_in_recalibrate_leaves_the_model_as_it_was():
    model = net()
    hook = TrainingHook(model, recalibrate=True)
    before = buffers(model)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), hook.evaluation([torch.randn(4, 5)]):
        raise AssertionError("not reached")
    assert same(buffers(model), before)
    assert all(module.training for module in model.modules())
    hook.step()  # and the hook goes on


def test_workers_that_serve_the_training_are_left_to_it():
    """Those of persistent_workers=True serve one walk over the loader at a time."""
    loader = DataLoader(data(), 16, num_workers=1, persistent_workers=True)
    model = net()
    hook = TrainingHook(model, recalibrate=True)
    seen = 0
    for _ in loader:
        seen += 1
        with hook.evaluation(loader):
            assert model[1].running_mean.any()
    assert seen == 4


def test_a_finding_is_said_once(caplog):
    model, kept = nn.Sequential(nn.Linear(6, 8), nn.Sigmoid(), nn.Linear(8, 3)), Kept()
    with torch.no_grad():
        model[0].weight.mul_(1000)
    with caplog.at_level(logging.INFO, "normwise"), TrainingHook(model, kept, every=1) as hook:
        train(model, DataLoader(data(), 16), hook)
    assert [(f.code, f.layer) for f in hook.findings] == [("NW012", "1")]
    assert [len(look.findings) for look in kept.looks] == [1, 0, 0, 0]
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("NW012 (warning) at '1': ")
    assert "Cure: a norm before the nonlinearity" in line


def test_the_optimizer_is_looked_at_too():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    with TrainingHook(model, optimizer=optimizer) as hook:
        cross_entropy(model(torch.randn(20, 6)), torch.randint(3, (20,))).backward()
        look = hook.step()
    assert [finding.code for finding in look.findings] == ["NW011"]


def test_a_run_goes_on_where_it_was_saved():
    model, loader = net(), DataLoader(data(), 16)
    hook = TrainingHook(model, every=3)
    hook.monitor._known.add(("NW012", "1"))
    train(model, loader, hook)
    state = hook.state_dict()
    assert state == {"steps": 4, "findings": [["NW012", "1"]]}
    kept = Kept()
    again = TrainingHook(net(), kept, every=3)
    again.load_state_dict(state)
    train(again.model, loader, again)
    assert [look.step for look in kept.looks] == [6]
    assert again.state_dict() == {"steps": 8, "findings": [["NW012", "1"]]}
    assert TrainingHook(net(), every=3, steps=4).monitor.watch is None


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def on_a_rank() -> dict[str, Any]:
    torch.manual_seed(0)
    rank = torch.distributed.get_rank()
    model, kept = DistributedDataParallel(Net()), Kept()
    hook = TrainingHook(model, kept, every=2, recalibrate=True)
    x, target = torch.randn(2, 32, 6)[rank], torch.randint(3, (2, 32))[rank]
    train(model, [(x[:16], target[:16]), (x[16:], target[16:])], hook, epochs=2)
    with hook.evaluation([(x, target)]):
        mean = model.module.net[1].running_mean.clone()
    hidden = model.module.net[0](x).detach().mean(0)
    state = hook.state_dict()["steps"]
    return {"steps": [look.step for look in kept.looks], "mean": mean, "hidden": hidden, "state": state}


def test_on_two_ranks_the_first_looks_and_both_share_their_statistics():
    first, second = on_ranks(2, on_a_rank)
    assert (first["steps"], second["steps"]) == ([0, 2], [])
    assert first["state"] == second["state"] == 4
    assert torch.equal(first["mean"], second["mean"])
    torch.testing.assert_close(first["mean"], (first["hidden"] + second["hidden"]) / 2)


def test_what_does_not_fit_is_refused():
    with pytest.raises(DiagnosisError, match="Sequential has no norm with running statistics of its own"):
        TrainingHook(nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8)), recalibrate=True)
    with pytest.raises(DiagnosisError, match="no norm with running statistics"):
        TrainingHook(frozen(), recalibrate=True)
    with pytest.raises(TypeError, match=r"recalibrate must be True, False or .*Recalibrate\(\.\.\.\), but got 32"):
        TrainingHook(net(), recalibrate=32)
    with pytest.raises(ValueError, match="an iterator, which is empty after the first time"):
        Recalibrate(batches=iter([torch.randn(4, 6)]))
    for batches in (0, True, "all", torch.randn(4, 6)):
        with pytest.raises(ValueError, match="how many batches of the train loader, a positive integer"):
            Recalibrate(batches=batches)
    with (
        pytest.raises(DiagnosisError, match=r"no batches to take statistics of: pass the train loader"),
        TrainingHook(net(), recalibrate=True).evaluation(),
    ):
        raise AssertionError("not reached")


def frozen() -> nn.Module:
    model = net()
    normwise.freeze(model)
    return model
