"""`TransformersMonitor` in the real Trainer of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from normwise.integrations import CSVLogger, Look, Recalibrate, TransformersMonitor

cross_entropy = nn.functional.cross_entropy
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:(accelerate|transformers)"),
]


class Kept:
    def __init__(self) -> None:
        self.looks: list[Look] = []

    def log(self, look: Look) -> None:
        self.looks.append(look)


class Net(nn.Module):
    """Remembers the running mean of each evaluation."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
        self.evaluated: list[Tensor] = []
        self.expected: list[Tensor] = []

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        if not self.training and not self.net[1].training:
            self.evaluated.append(self.net[1].running_mean.clone())
            self.expected.append(self.net[0](X).mean(0))
        out = self.net(x)
        return {"logits": out} if labels is None else {"loss": cross_entropy(out, labels), "logits": out}


torch.manual_seed(1)
X, TARGET = torch.randn(64, 6) * 3 + 1, torch.randint(3, (64,))
DATA = [{"x": x, "labels": target} for x, target in zip(X, TARGET, strict=True)]


def train(model: nn.Module, callbacks: list[Any], folder: Any, data: Any = None, **settings: Any) -> Trainer:
    resume = settings.pop("resume", None)
    defaults = {
        "max_steps": 6,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 64,
        "learning_rate": 0.05,
        "save_strategy": "no",
        "logging_strategy": "no",
    }
    arguments = TrainingArguments(
        output_dir=str(folder), report_to=[], use_cpu=True, disable_tqdm=True, **defaults | settings
    )
    trainer = Trainer(
        model=model, args=arguments, train_dataset=data or DATA, eval_dataset=data or DATA, callbacks=callbacks
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_a_step_is_the_optimizers_and_gradients_are_read_before_they_are_gone(tmp_path):
    kept, model = Kept(), Net()
    monitor = TransformersMonitor(kept, every=3)
    train(model, [monitor], tmp_path, gradient_accumulation_steps=2, max_grad_norm=0.01, max_steps=4)
    assert [look.step for look in kept.looks] == [0, 3]
    assert {layer.calls for layer in kept.looks[0].layers} == {2}
    squares = [v**2 for tag, v in kept.looks[0].scalars.items() if "/gradient/" in tag]
    assert sum(squares) ** 0.5 == pytest.approx(0.01, rel=1e-3)  # all of them, clipped
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_training_is_the_same_to_the_bit_and_evaluation_has_the_train_datas_statistics(tmp_path, strategy):
    alone, watched = Net(), Net()
    for model, callbacks in ((alone, []), (watched, [TransformersMonitor(Kept(), every=2, recalibrate=True)])):
        train(model, callbacks, tmp_path, eval_strategy=strategy, eval_steps=2)
    assert len(watched.evaluated) == len(alone.evaluated) > 0
    for found, expected in zip(watched.evaluated, watched.expected, strict=True):
        torch.testing.assert_close(found, expected)
    assert not any(torch.allclose(a, b) for a, b in zip(alone.evaluated, alone.expected, strict=True))
    same = [torch.equal(a, b) for a, b in zip(alone.state_dict().values(), watched.state_dict().values(), strict=True)]
    assert all(same)


def test_a_run_goes_on_from_a_checkpoint_which_has_the_statistics_of_training(tmp_path):
    kept, model = Kept(), Net()
    each_second = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    train(model, [TransformersMonitor(kept, every=3, recalibrate=True)], tmp_path, **each_second)
    assert [look.step for look in kept.looks] == [0, 3]
    again, later = Kept(), Net()
    monitor = TransformersMonitor(again, every=3, recalibrate=True)
    train(later, [monitor], tmp_path, max_steps=8, resume=str(tmp_path / "checkpoint-2"), **each_second)
    assert [look.step for look in again.looks] == [3, 6]
    assert kept.looks[1].scalars == pytest.approx(again.looks[0].scalars, rel=1e-5)


def test_statistics_of_the_train_data_stay_at_the_end(tmp_path):
    model = Net()
    train(model, [TransformersMonitor(recalibrate=Recalibrate(at_end=True, before_validation=False))], tmp_path)
    torch.testing.assert_close(model.net[1].running_mean, model.net[0](X).detach().mean(0))


def test_a_real_model_with_a_compiled_forward_in_bfloat16(tmp_path):
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
    )
    torch.manual_seed(0)
    tokens = [{"input_ids": torch.randint(50, (8,)), "labels": int(torch.randint(2, ()))} for _ in range(32)]
    monitor = TransformersMonitor(CSVLogger(tmp_path / "csv"), every=3)
    settings = {"torch_compile": True, "torch_compile_backend": "eager", "bf16": True}
    train(BertForSequenceClassification(config), [monitor], tmp_path, tokens, **settings)
    rows = (tmp_path / "csv" / "scalars.csv").read_text()
    assert "0,normwise/bert.encoder.layer.0.attention.output.LayerNorm/std," in rows
    assert "3,normwise/bert.encoder.layer.1.output.dense/gradient/weight," in rows
    assert not [finding.code for finding in monitor.findings if finding.severity == "error"]
