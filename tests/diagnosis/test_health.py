"""Models in ordinary health raise nothing that is not so, fresh and after a little training."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from normwise.diagnosis import diagnose
from normwise.lab.tasks import TASKS, Batch

sys.path.insert(0, str(Path(__file__).parent))
from support.transformer_nets import GPT, Encoder, ViT, sentences

cross_entropy = nn.functional.cross_entropy


class Block(nn.Module):
    """The basic block of He et al. 2016."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        stride = 1 if channels_in == channels else 2
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = (
            nn.Identity()
            if stride == 1
            else nn.Sequential(nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + self.downsample(x))


def resnet() -> nn.Sequential:
    stem = [nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)]
    blocks = [Block(8, 8), Block(8, 8), Block(8, 16), Block(16, 16), Block(16, 32), Block(32, 32)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4))


class Tagger(nn.Module):
    """An nn.LSTM in both directions, and the mean over its steps."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 16, 2, batch_first=True, bidirectional=True, dropout=0.1)
        self.linear = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.lstm(x)[0].mean(1))


def images() -> Tensor:
    return torch.randn(32, 3, 12, 12)


def sequences() -> Tensor:
    return torch.randn(32, 25, 6)


def tokens() -> Tensor:
    valid = torch.arange(15) < torch.randint(4, 16, (32, 1))
    return torch.randint(1, 50, (32, 15)) * valid


@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
@pytest.mark.parametrize(
    ("make", "inputs"),
    [
        (resnet, images),
        (Tagger, sequences),
        (Encoder, tokens),
        (lambda: Encoder(norm_first=True), tokens),
        (ViT, images),
    ],
    ids=["resnet", "lstm", "post-norm", "pre-norm", "vit"],
)
def test_real_models_raise_nothing(make, inputs, trained):
    raises_nothing(make(), [(x, torch.randint(4, (32,))) for x in (inputs() for _ in range(4))], trained)


@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
@pytest.mark.parametrize("make", [GPT, lambda: GPT(blocks=12, norm=nn.LayerNorm), lambda: GPT(qk_norm=True)])
def test_language_models_raise_nothing(make: Callable[[], nn.Module], trained: bool):
    raises_nothing(make(), sentences(count=4), trained)


def test_what_grows_as_gpt_2_starts_raises_nothing():
    """Embeddings of 0.02, which the first block outgrows at once."""
    model = GPT(blocks=12, norm=nn.LayerNorm)
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
    raises_nothing(model, sentences(count=4), trained=False)


def raises_nothing(model: nn.Module, data: list, trained: bool) -> None:
    if trained:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
        for x, target in 5 * data:
            optimizer.zero_grad()
            cross_entropy(model(x), target).backward()
            optimizer.step()
    found = diagnose(model, data, loss=cross_entropy)
    assert [(finding.code, finding.layer, finding.cause) for finding in found.findings] == []
    assert found.notes == []


# What is so: linear maps with a bias stand before BatchNorm, padding enters, weights start wrong on purpose.
TRUE = {
    ("mlp", "batch"): {"NW005"},
    ("mlp-bad-start", "batch"): {"NW005"},
    ("mlp-bad-start", "none"): {"NW012"},
    ("transformer", "batch"): {"NW004"},
    ("rnn", "batch-time-average"): {"NW015"},
    ("lstm", "batch-time-average"): {"NW015"},
}


@pytest.mark.parametrize("name", TASKS)
def test_the_labs_nets_raise_what_is_so(name):
    task = TASKS[name]()

    def pairs(seed: int) -> Iterator[tuple[object, object]]:
        for batch in task.batches(task.batch_sizes[0], 1, seed):
            lengths = {} if batch.lengths is None else {"lengths": batch.lengths}
            yield {"inputs": batch.inputs, **lengths}, batch

    for norm in task.norms:
        if norm == "instance" and name.startswith("mlp"):
            continue  # undefined there
        net = task.model(norm, 0)

        class Called(nn.Module):
            def __init__(self, net: nn.Module) -> None:
                super().__init__()
                self.net = net

            def forward(self, inputs: Tensor, lengths: Tensor | None = None) -> Tensor:
                return task.forward(self.net, Batch(inputs, inputs, lengths))

        found = diagnose(Called(net), pairs(0), loss=task.loss)
        assert {finding.code for finding in found.findings} == TRUE.get((name, norm), set()), norm
