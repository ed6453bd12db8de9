"""The tasks on text: what they read, what they predict, that none sees what is to come."""

from __future__ import annotations

import math
import random

import pytest
import torch

from normwise.lab.errors import LabError
from normwise.lab.run import run
from normwise.lab.spec import Spec, expand
from normwise.lab.tasks import TEXTS, load_task
from normwise.lab.tasks.base import Batch
from normwise.lab.tasks.charlm import python_topics
from normwise.lab.watch import accuracy

each_task = pytest.mark.parametrize("name", TEXTS)


@pytest.fixture
def text(tmp_path):
    """12,000 characters, each of eight equally likely: no net can do better than three bits."""
    path = tmp_path / "a.py@text.txt"  # a name that looks like a task of a user's own
    path.write_text("".join(random.Random(0).choices("aeiou äß", k=12_000)), encoding="utf-8")
    return path


def test_the_default_is_python_s_own_documentation():
    task = load_task("charlm-lstm").task
    assert task.text == python_topics()
    assert len(task.text) > 300_000
    assert task.settings["data"] == load_task("charlm-gru").task.fingerprint


def test_pieces_are_the_text_and_targets_the_next_characters(text):
    task = load_task(f"charlm-gru@{text}").task
    train, held_out = task.cases
    assert task.characters == " aeioußä"
    assert train.inputs.shape == ((12_000 - 1200 - 1) // 64, 64)
    spelled = "".join(task.characters[number] for number in train.inputs.flatten())
    assert task.text.startswith(spelled)
    assert torch.equal(train.targets.flatten()[:-1], train.inputs.flatten()[1:])
    last = "".join(task.characters[number] for number in held_out.inputs.flatten())
    assert task.text[-1200:].startswith(last)


@each_task
def test_the_key_follows_the_text_and_not_its_place(name, text, tmp_path):
    moved, changed = tmp_path / "moved.txt", tmp_path / "changed.txt"
    moved.write_bytes(text.read_bytes())
    changed.write_bytes(text.read_bytes() + b"a")
    keys = [Spec(f"{name}@{path}", "none", 4, 0.01, 0, 1).key() for path in (text, moved, changed)]
    assert keys[0] == keys[1] != keys[2]


@each_task
@pytest.mark.parametrize("norm", ["none", "layer"])
def test_nothing_sees_the_characters_to_come(name, norm, text):
    task = load_task(f"{name}@{text}").task
    model, batch = task.model(norm, 0), task.cases[0].select(slice(0, 3))
    changed = batch.inputs.clone()
    changed[:, 40:] = (changed[:, 40:] + 1) % len(task.characters)
    with torch.no_grad():
        before, after = model(batch.inputs), model(changed)
    torch.testing.assert_close(after[:, :40], before[:, :40])
    assert not torch.allclose(after[:, 40:], before[:, 40:])


@each_task
def test_bits_per_character_are_the_loss_to_base_2_and_noise_has_three(name, text):
    series = run(Spec(f"{name}@{text}", "layer", 8, 0.003, 0, 60)).series
    bits = series["final/bits-per-character"].values[-1]
    assert bits == pytest.approx(series["final/loss"].values[-1] / math.log(2))
    assert 2.95 < bits < 3.3
    assert series["heldout/eval/bits-per-character"].values[-1] > 2.9


@each_task
def test_training_learns(name):
    series = run(Spec(name, "none", 16, 0.01, 0, 40)).series
    assert series["final/bits-per-character"].values[-1] < 4  # 4.5 or more is what single characters tell


def test_statistics_of_each_step_can_be_asked_for():
    (spec,) = expand("charlm-gru", seeds=1, norms=["batch-per-step"], batch_sizes=[4], learning_rates=[0.01], steps=1)
    assert run(spec).status == "done"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"plain " * 2000 + b"\xff" + b"plain " * 2000, r"offset 12000: no UTF-8 \(invalid start byte\); convert it"),
        (b"short", "has 5 characters, expected at least 6,500"),
        (b"", "has 0 characters, expected at least 6,500"),
    ],
)
def test_what_is_no_text_is_named(content, message, tmp_path):
    (tmp_path / "text").write_bytes(content)
    with pytest.raises(LabError, match=message):
        expand(f"charlm-lstm@{tmp_path / 'text'}", seeds=1)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(LabError, match="nowhere cannot be read: No such file"):
        expand(f"charlm-lstm@{tmp_path / 'nowhere'}", seeds=1)


def test_ragged_pieces_end_in_padding_that_counts_for_nothing(text):
    task = load_task(f"charlm-ragged@{text}").task
    train, _ = task.cases
    valid = train.inputs >= 0
    assert torch.equal(valid, train.targets >= 0)
    assert torch.equal(valid.int().cummin(1).values, valid.int())
    assert (int(valid.sum(1).min()), int(valid.sum(1).max())) == (8, 64)
    batch = train.select(slice(0, 4))
    changed = Batch(batch.inputs.masked_fill(batch.inputs < 0, -1), batch.targets)
    for norm in ("layer", "batch-masked"):
        model = task.model(norm, 0).eval()
        assert torch.equal(task.forward(model, batch), task.forward(model, changed))
    scores = torch.zeros(4, 64, len(task.characters))
    scores[..., 0] = 1.0
    for at, piece in enumerate(batch.targets):  # right wherever there is a target, wrong on the padding
        scores[at, piece >= 0, piece[piece >= 0]] = 30.0
    assert accuracy(scores, batch.targets) == 1.0
    assert float(task.loss(scores, batch)) < 1e-6


@pytest.mark.parametrize(("norm", "changes"), [("layer", False), ("batch-masked", False), ("batch", True)])
def test_padding_moves_what_the_unmasked_norm_alone_computes(norm, changes, text):
    """In train mode, with 40 more positions of padding."""
    task = load_task(f"charlm-ragged@{text}").task
    model = task.model(norm, 0)
    inputs = task.cases[0].inputs[:4]
    longest = int((inputs >= 0).sum(1).max())
    cut = model(inputs[:, :longest])
    padded = model(torch.cat([inputs[:, :longest], torch.full((4, 40), -100)], 1))[:, :longest]
    # Of logits up to 5.5: float32 sums over more positions move them by 3e-6, what padding changes by 2.4.
    same = torch.allclose(cut[inputs[:, :longest] >= 0], padded[inputs[:, :longest] >= 0], atol=2e-5)
    assert same is not changes
