"""What a diagnosis costs: passes, counted, and seconds, bounded; and that it is told how far it is."""

from __future__ import annotations

import itertools
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import normwise
from normwise.diagnosis import DiagnosisError, diagnose
from normwise.diagnosis.modes import reads_mode

sys.path.insert(0, str(Path(__file__).parent))
from support.transformer_nets import GPT, sentences

cross_entropy = nn.functional.cross_entropy


class Block(nn.Module):
    def __init__(self, *inside: nn.Module) -> None:
        super().__init__()
        self.inside = nn.ModuleList(inside)
        self.idle = nn.ModuleList([nn.Identity(), nn.Dropout(0.0), nn.LayerNorm(8), nn.AdaptiveAvgPool1d(8), nn.GELU()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.inside, *self.idle):
            x = layer(x)
        return x


class DropPath(nn.Module):
    """Somebody's own dropout, which reads its mode in a function beside it."""

    def forward(self, x: Tensor) -> Tensor:
        return dropped(x, self)


def dropped(x: Tensor, layer: nn.Module) -> Tensor:
    return x * (torch.rand(len(x), 1) > 0.5) * 2 if layer.training else x


class Aside(nn.Module):
    """Its mode makes a difference to nothing but a branch that a hook asks for."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def data(count: int = 3) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(32, 8), torch.randint(8, (32,))) for _ in range(count)]


def counted(model: nn.Module) -> list[int]:
    passes = [0]
    model.register_forward_pre_hook(lambda *_: passes.__setitem__(0, passes[0] + 1))
    return passes


@pytest.mark.parametrize(
    ("inside", "switched"),
    [
        (lambda: [nn.Linear(8, 8)], 0),
        (lambda: [nn.Linear(8, 8), nn.BatchNorm1d(8)], 6),
        (lambda: [nn.BatchNorm1d(8), nn.Dropout(0.1)], 12),
        (lambda: [nn.BatchNorm1d(8, track_running_stats=False), normwise.FrozenBatchNorm1d(8)], 0),
        (lambda: [DropPath()], 6),
        (lambda: [nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))], 0),
        (lambda: [nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))], 6),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm")
def test_a_pass_for_each_layer_to_which_the_mode_makes_a_difference(inside, switched):
    model = nn.Sequential(*(Block(*inside()) for _ in range(6)))
    passes, told = counted(model), []
    found = diagnose(model, data(), loss=cross_entropy, progress=lambda done, total: told.append((done, total)))
    assert passes[0] == 3 * 2 + 2 * switched
    assert sum(layer.gap is not None for layer in found.layers) == switched
    assert told[-1] == (passes[0], passes[0])
    assert found.gap.elsewhere == 0.0


def test_a_transformer_costs_no_pass_more_and_is_looked_at_in_train_mode_alone():
    model = GPT()
    passes = counted(model)
    found = diagnose(model, sentences(count=3), loss=cross_entropy)
    assert passes[0] == 2 * 3
    assert [attention.calls for attention in found.attention] == [3] * 4


def test_a_monitor_leaves_attention_and_blocks_alone():
    """What a training step cannot spare: of a module that is no layer, no hook."""
    model = GPT()
    with normwise.Monitor(model, SimpleNamespace(add_scalar=print)):
        assert not model.blocks[0]._forward_hooks
        assert not model.blocks[0].attention._forward_hooks
        assert model.blocks[0].norm1._forward_hooks
    assert not model.blocks[0].norm1._forward_hooks


def test_frozen_layers_are_not_woken():
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    normwise.freeze(model)
    passes = counted(model)
    diagnose(model, data(2), loss=cross_entropy)
    assert passes[0] == 4


def test_code_that_reads_the_mode_outside_of_layers_is_measured():
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(self.linear(x), 0.5, self.training)

    model = Root()
    passes = counted(model)
    assert diagnose(model, data(2), loss=cross_entropy).gap.elsewhere > 0.1
    assert passes[0] == 6


def test_what_reads_the_mode():
    class Getattr(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if getattr(self, "training") else x  # noqa: B009

    class Property(nn.Module):
        @property
        def factor(self) -> int:
            return 2 if self.training else 1

        def forward(self, x: Tensor) -> Tensor:
            return x * self.factor

    hooked, patched = Aside(), Aside()
    hooked.register_forward_hook(lambda module, args, out: out * 2 if module.training else out)
    patched.forward = lambda x: x * 2 if patched.training else x
    assert all(reads_mode(m) for m in (Getattr(), Property(), hooked, patched, DropPath()))
    assert not any(reads_mode(m) for m in (Aside(), nn.Identity(), nn.Sequential(nn.Dropout()), Block()))


class Slow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.BatchNorm1d(8) for _ in range(20)))

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(0.05)
        return self.layers(x)


def test_a_limit_of_time_and_what_it_left_out():
    model = Slow()
    passes = counted(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    endless = (data(1)[0] for _ in itertools.count())
    start = time.monotonic()
    found = diagnose(model, endless, loss=cross_entropy, optimizer=optimizer, max_seconds=0.01, max_batches=5)
    assert time.monotonic() - start < 5
    assert passes[0] == 2
    assert found.data.batches == 1
    (note,) = [note for note in found.notes if "max_seconds" in note]
    assert note.startswith("After 0.01 s (max_seconds) was left out: batches after the first 1;")
    assert "layers.0, layers.1, layers.2, layers.3 and 16 more" in note
    assert "the optimizer's steps" in note
    assert found.gap.output >= 0
    assert "max_seconds" in str(found).replace("\n      ", " ")


def test_time_enough_leaves_nothing_out():
    found = diagnose(nn.Sequential(nn.BatchNorm1d(8)), data(2), loss=cross_entropy, max_seconds=600)
    assert found.notes == []
    assert found.data.batches == 2


@pytest.mark.parametrize("value", [0, -1.0, True, "5", float("nan")])
def test_a_limit_that_is_no_time_is_refused(value):
    with pytest.raises(DiagnosisError, match="max_seconds must be a positive number of seconds"):
        diagnose(nn.Linear(8, 8), data(1), loss=cross_entropy, max_seconds=value)


def test_a_bar_is_shown_on_stderr(capsys):
    diagnose(nn.Linear(8, 8), data(1), loss=cross_entropy, progress=True)
    assert capsys.readouterr().out == ""
