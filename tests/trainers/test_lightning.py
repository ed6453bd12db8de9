"""`LightningMonitor` in the real Trainer of Lightning."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from normwise.diagnosis import DiagnosisError
from normwise.integrations import LightningMonitor, Look, Recalibrate

cross_entropy = nn.functional.cross_entropy
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*GPU available but not used"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning"),
]


class Kept:
    def __init__(self) -> None:
        self.looks: list[Look] = []

    def log(self, look: Look) -> None:
        self.looks.append(look)


class Module(pl.LightningModule):
    """Remembers the running mean that each validation was made with."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
        self.validated: list[Tensor] = []
        self.expected: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, target = batch
        return cross_entropy(self(x), target)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if not self.trainer.sanity_checking:
            self.validated.append(self.net[1].running_mean.clone())
            self.expected.append(self.net[0](X).mean(0))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


torch.manual_seed(1)
X, TARGET = torch.randn(64, 6) * 3 + 1, torch.randint(3, (64,))


def loader(shuffle: bool = False) -> Any:
    return DataLoader(TensorDataset(X, TARGET), 16, shuffle=shuffle)


def fit(module: pl.LightningModule, callbacks: Any, folder: Any, given: Any = None, **settings: Any) -> pl.Trainer:
    checkpoint = settings.pop("ckpt_path", None)
    quiet = {"logger": False, "enable_checkpointing": False, "max_epochs": 2}
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=callbacks,
        **quiet | settings,
    )
    trainer.fit(module, given or loader(), loader(), ckpt_path=checkpoint)
    return trainer


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_a_step_is_the_optimizers_and_its_numbers_are_of_all_its_batches(tmp_path):
    kept, module = Kept(), Module()
    start = {name: value.clone() for name, value in module.net.state_dict().items()}
    fit(module, LightningMonitor(kept, every=3), tmp_path, accumulate_grad_batches=2, gradient_clip_val=1e-3)
    assert [look.step for look in kept.looks] == [0, 3]
    assert hooks(module) == 0
    again = Module().net
    again.load_state_dict(start)
    for part in (slice(0, 16), slice(16, 32)):
        (cross_entropy(again(X[part]), TARGET[part]) / 2).backward()
    first = kept.looks[0].scalars
    assert first["normwise/net.3/gradient/weight"] == pytest.approx(float(again[3].weight.grad.norm()), rel=1e-5)
    assert first["normwise/net.0/mean"] == pytest.approx(float(again[0](X[:32]).detach().mean()), abs=1e-5)


def test_the_trainers_own_tensorboard_has_numbers_and_findings(tmp_path):
    module = Module()
    module.net[1].momentum = 0.99
    logger = TensorBoardLogger(tmp_path, name="", version="run")
    monitor = LightningMonitor(every=4, module="net")
    fit(module, monitor, tmp_path, logger=logger)
    logger.finalize("success")
    events = EventAccumulator(str(tmp_path / "run"), size_guidance={"histograms": 0})
    events.Reload()
    scalars = events.Tags()["scalars"]
    assert {"normwise/0/gradient/weight", "normwise/1/running/distance", "normwise/2/saturated"} <= set(scalars)
    assert [event.step for event in events.Scalars("normwise/0/std")] == [0, 4]
    assert [event.step for event in events.Histograms("normwise/1/gain")] == [0, 4]
    (text,) = events.Tensors("normwise/findings/NW006/text_summary")
    assert b"momentum=0.99 is the weight of the NEW batch" in text.tensor_proto.string_val[0]
    assert [(f.code, f.layer) for f in monitor.findings] == [("NW006", "1")]


def test_training_is_the_same_to_the_bit_and_validation_has_the_train_datas_statistics(tmp_path):
    alone, watched = Module(), Module()
    for module, callbacks in ((alone, []), (watched, [LightningMonitor(Kept(), every=2, recalibrate=True)])):
        pl.seed_everything(3, verbose=False)
        fit(module, callbacks, tmp_path, loader(shuffle=True), val_check_interval=2)
    assert len(watched.validated) == len(alone.validated) == 16
    for found, expected in zip(watched.validated, watched.expected, strict=True):
        torch.testing.assert_close(found, expected)
    assert not any(torch.allclose(a, b) for a, b in zip(alone.validated, alone.expected, strict=True))
    same = [torch.equal(a, b) for a, b in zip(alone.state_dict().values(), watched.state_dict().values(), strict=True)]
    assert all(same)


def test_a_validation_between_the_batches_of_a_step_is_not_looked_at(tmp_path):
    kept = Kept()
    module = Module()
    fit(module, LightningMonitor(kept, every=1), tmp_path, accumulate_grad_batches=2, val_check_interval=1)
    assert [look.step for look in kept.looks] == [0, 1, 2, 3]
    assert {layer.calls for look in kept.looks for layer in look.layers} == {2}


def test_averaged_weights_are_validated_with_statistics_of_their_own(tmp_path):
    def run(callbacks: list[Any]) -> Module:
        module = Module()
        fit(module, [*callbacks, EMAWeightAveraging(decay=0.5)], tmp_path)
        return module

    alone = run([])
    watched = run([LightningMonitor(Kept(), recalibrate=Recalibrate(at_end=True))])
    for found, expected in zip(watched.validated, watched.expected, strict=True):
        torch.testing.assert_close(found, expected)
    # What the average had is back behind each validation, and the end has statistics of the averaged weights.
    for name, value in watched.net.named_parameters():
        torch.testing.assert_close(value, dict(alone.net.named_parameters())[name], rtol=0, atol=0)
    torch.testing.assert_close(watched.net[1].running_mean, watched.net[0](X).detach().mean(0))
    with pytest.raises(DiagnosisError, match=r"EMAWeightAveraging stands before LightningMonitor"):
        fit(Module(), [EMAWeightAveraging(), LightningMonitor(recalibrate=True)], tmp_path)


def test_after_stochastic_weight_averaging(tmp_path):
    module = Module()
    monitor = LightningMonitor(Kept(), recalibrate=Recalibrate(before_validation=False, at_end=True))
    average = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)
    fit(module, [monitor, average], tmp_path, max_epochs=4)
    torch.testing.assert_close(module.net[1].running_mean, module.net[0](X).detach().mean(0))


def test_a_checkpoint_has_the_statistics_of_training_and_a_run_goes_on_from_it(tmp_path):
    kept, module = Kept(), Module()
    module.net[1].momentum = 0.99
    saver = ModelCheckpoint(tmp_path / "saved", filename="{epoch}", save_top_k=-1)
    monitor = LightningMonitor(kept, every=3, recalibrate=True)
    fit(module, [monitor, saver], tmp_path, enable_checkpointing=True)
    assert [look.step for look in kept.looks] == [0, 3, 6]
    saved = torch.load(tmp_path / "saved" / "epoch=1.ckpt", weights_only=True)
    assert torch.equal(saved["state_dict"]["net.1.running_mean"], module.net[1].running_mean)
    again, later, longer = Kept(), Module(), {"ckpt_path": tmp_path / "saved" / "epoch=0.ckpt", "max_epochs": 3}
    later.net[1].momentum = 0.99
    fit(later, LightningMonitor(again, every=3, recalibrate=True), tmp_path, **longer)
    assert [look.step for look in again.looks] == [6, 9]
    assert [finding.code for look in kept.looks for finding in look.findings] == ["NW006"]
    assert [finding.code for look in again.looks for finding in look.findings] == []


def test_a_compiled_module_is_looked_at_and_compiled_once(tmp_path):
    compiled: list[Any] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    kept, eager = Kept(), Kept()
    torch._dynamo.reset()
    fit(torch.compile(Module(), backend=backend), LightningMonitor(kept, every=3), tmp_path, limit_val_batches=0)
    # What Lightning compiles is training_step, whose look-ups of the trainer break it into graphs; none is made twice.
    once = len(compiled)
    assert once > 0
    torch._dynamo.reset()
    fit(torch.compile(Module(), backend=backend), [], tmp_path, limit_val_batches=0)
    assert len(compiled) == 2 * once
    fit(Module(), LightningMonitor(eager, every=3), tmp_path)
    for found, expected in zip(kept.looks, eager.looks, strict=True):
        assert found.scalars == pytest.approx(expected.scalars, rel=1e-4, abs=1e-6)


def test_mixed_precision(tmp_path):
    kept = Kept()
    fit(Module(), LightningMonitor(kept, recalibrate=True), tmp_path, precision="bf16-mixed")
    (look,) = kept.looks
    assert {layer.name: layer.output.dtype for layer in look.layers}["net.0"] == "bfloat16"
    assert look.scalars["normwise/net.3/gradient/weight"] > 0


class TwoLoaders(Module):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return sum(cross_entropy(self(x), target) for x, target in batch.values())


@pytest.mark.parametrize("together", [False, True])
def test_several_train_loaders(tmp_path, together):
    other = X * 2 - 1
    given = {"a": loader(), "b": DataLoader(TensorDataset(other, TARGET), 16)}
    both = (lambda model, batch: [model(x) for x, _ in batch.values()]) if together else None
    module = TwoLoaders()
    monitor = LightningMonitor(Kept(), recalibrate=Recalibrate(before_validation=False, at_end=True, forward=both))
    fit(module, monitor, tmp_path, given)
    pooled = module.net[0](torch.cat([X, other])).detach().mean(0)
    torch.testing.assert_close(module.net[1].running_mean, pooled)


class Gan(Module):
    """Two optimizers that step in turn, by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, target = batch
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(cross_entropy(self(x), target))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.net[at].parameters(), lr=0.05) for at in (0, 3)]


def test_optimizers_that_step_in_turn_are_one_step(tmp_path):
    kept = Kept()
    fit(Gan(), LightningMonitor(kept, every=3), tmp_path)
    assert [look.step for look in kept.looks] == [0, 3, 6]
    assert {"normwise/net.0/gradient/weight", "normwise/net.3/gradient/weight"} <= kept.looks[0].scalars.keys()


def test_no_hook_stays_after_an_error(tmp_path):
    class Failing(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            raise RuntimeError("out of luck")

    module = Failing()
    with pytest.raises(RuntimeError, match="out of luck"):
        fit(module, LightningMonitor(Kept()), tmp_path)
    assert hooks(module) == 0


def test_a_part_that_is_not_there(tmp_path):
    with pytest.raises(DiagnosisError, match=r"module='encoder' is no part of Module, whose parts are net"):
        fit(Module(), LightningMonitor(Kept(), module="encoder"), tmp_path)
