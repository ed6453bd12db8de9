"""The tasks on sequences of different lengths: their data, what is looked at inside, what a run records."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from normwise.lab import watch
from normwise.lab.datasets import load_japanese_vowels
from normwise.lab.run import run
from normwise.lab.spec import Spec
from normwise.lab.tasks import Batch, load_task
from normwise.lab.tasks.transformer import places
from normwise.measure.snapshot import dry_run

RECURRENT = ("rnn", "lstm")
RECURRENT_NORMS = load_task("rnn").task.norms
SPEC = Spec("rnn", "layer", 8, 0.003, seed=0, steps=6)


def batch_of(task, cases=6):
    """Held-out cases of different lengths."""
    _, held_out = task.cases
    return held_out.select(torch.arange(0, 60 * cases, 60))


@pytest.fixture(params=RECURRENT)
def task(request):
    return load_task(request.param).task


def test_training_has_the_first_frames_and_the_longer_ones_are_whole_and_cut(task):
    train, held_out = task.cases
    assert (len(train), len(held_out), task.longest) == (270, 370, 16)
    assert int(held_out.lengths.max()) == 29
    longer, cut = task.parts()["longer"], task.parts()["longer-cut"]
    assert len(longer) == len(cut) == int((held_out.lengths > 16).sum()) == 125
    assert cut.lengths.tolist() == [16] * 125
    assert torch.equal(cut.inputs, longer.inputs[:, :16])
    assert torch.equal(cut.targets, longer.targets)


def test_frames_are_standardized_over_those_of_the_training_set_and_padding_is_0(task):
    train, held_out = task.cases
    for batch in (train, held_out):
        valid = torch.arange(batch.inputs.shape[1]) < batch.lengths[:, None]
        assert not batch.inputs[~valid].any()
    raw, _ = load_japanese_vowels()
    frames = raw.frames.flatten(0, 1)[(torch.arange(26) < raw.lengths[:, None]).flatten()].double()
    expected = (raw.frames[3, 5].double() - frames.mean(0)) / frames.var(0, correction=0).sqrt()
    torch.testing.assert_close(train.inputs[3, 5].double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("norm", RECURRENT_NORMS)
@pytest.mark.parametrize("training", [True, False])
def test_the_gradient_at_a_sequence_s_end_is_that_of_the_cross_entropy(task, norm, training):
    # It does not pass through any norm: W^T (softmax - one hot), whatever happens inside.
    model, batch = task.model(norm, 0).train(training), batch_of(task)
    with dry_run(model, training=training):
        scores = task.forward(model, batch)
    wrong = scores.softmax(-1) - nn.functional.one_hot(batch.targets, 9)
    expected = (wrong @ model.linear.weight).square().sum(-1)
    found = task.over_time(model, batch)["gradient"].gather(1, batch.lengths[:, None] - 1)[:, 0]
    torch.testing.assert_close(found, expected.detach(), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("norm", ["none", "layer", "rms"])
def test_the_gradient_of_a_step_is_that_of_a_run_which_starts_there(task, norm):
    model, batch, t = task.model(norm, 0), batch_of(task), 4
    found = task.over_time(model, batch)["gradient"][:, t]
    before = Batch(batch.inputs[:, : t + 1], batch.targets, batch.lengths.clamp(max=t + 1))
    _, state = model.recurrent(before.inputs, lengths=before.lengths)
    state = [s.detach().requires_grad_() for s in (state if isinstance(state, tuple) else (state,))]
    _, last = model.recurrent(
        batch.inputs[:, t + 1 :], tuple(state) if len(state) > 1 else state[0], lengths=batch.lengths - t - 1
    )
    h = last[0] if isinstance(last, tuple) else last
    (gradient,) = torch.autograd.grad(task.loss(model.linear(h[0]), batch) * len(batch), state[0])
    # Of an LSTM that is h_t alone, as here, where c_t stands beside it.
    torch.testing.assert_close(found, gradient[0].square().sum(-1), atol=1e-6, rtol=1e-4)


def test_summed_inputs_are_as_large_as_the_norm_says():
    rnn = load_task("rnn").task
    batch = batch_of(rnn)
    valid = torch.arange(batch.inputs.shape[1]) < batch.lengths[:, None]
    plain = rnn.over_time(rnn.model("none", 0), batch)
    torch.testing.assert_close(plain["summed"], plain["unnormalized"])  # biases start at 0
    first = batch.inputs[:, 0] @ rnn.model("none", 0).recurrent.weight_ih_l0.T
    torch.testing.assert_close(plain["summed"][:, 0], first.square().mean(-1).detach())
    for norm in ("layer", "rms"):
        sizes = rnn.over_time(rnn.model(norm, 0), batch)["summed"][valid]
        torch.testing.assert_close(sizes, torch.ones_like(sizes), atol=1e-3, rtol=0)
    # Gains of 0.1 on each of two terms, each of unit variance over the batch, where a step has two samples or more.
    two_or_more = valid & (valid.sum(0) > 1)
    sizes = rnn.over_time(rnn.model("batch-per-step", 0).train(), batch)["summed"][two_or_more]
    assert 0.01 < float(sizes.mean()) < 0.04


def test_per_step_and_time_averaged_statistics_train_alike_and_differ_in_evaluation(task):
    runs = [
        run(dataclasses.replace(SPEC, task=task.name, norm=norm, steps=3))
        for norm in ("batch-per-step", "batch-time-average")
    ]
    one, other = (result.series for result in runs)
    assert one["train/loss"].values == other["train/loss"].values
    assert one["heldout/train/loss"].values == other["heldout/train/loss"].values
    assert one["heldout/eval/loss"].values[1:] != other["heldout/eval/loss"].values[1:]


def test_averaged_over_time_means_that_all_steps_count_alike():
    rnn = load_task("rnn").task
    layers = [rnn.model(norm, 0).train().recurrent for norm in ("batch-per-step", "batch-time-average")]
    train, _ = rnn.cases
    full = train.select(torch.nonzero(train.lengths == 16).flatten())
    for _ in range(60):
        for layer in layers:
            layer(full.inputs, lengths=full.lengths)
    per_step, shared = (layer.running_mean_ih_l0 for layer in layers)
    assert (len(per_step), len(shared)) == (16, 1)
    spread = per_step.std(0).mean()
    assert (shared[0] - per_step.mean(0)).abs().mean() < 0.05 * spread


@pytest.mark.parametrize("name", [*RECURRENT, "transformer"])
def test_series_of_a_run(name):
    spec = dataclasses.replace(SPEC, task=name)
    series = run(spec).series
    assert series["train/longest"].values == [16]
    for part in ("longer", "longer-cut"):
        assert 0 <= series[f"final/{part}/accuracy"].values[-1] <= 1
        assert series[f"final/{part}/loss"].values[-1] > 0
    names = ("summed", "gradient") + (("unnormalized",) if name in RECURRENT else ())
    for quantity in names:
        for mode in ("train", "eval"):
            for when in ("start", "end"):
                found = series[f"over-time/{quantity}/{mode}/{when}"]
                assert found.steps == list(range(len(found.steps)))
                assert 18 < len(found.steps) < 29
                assert min(found.values) > 0
    assert {n.split("/")[1] for n in series if n.startswith("over-time/")} == set(names)


@pytest.mark.parametrize("name", [*RECURRENT, "transformer"])
def test_training_learns(name):
    result = run(dataclasses.replace(SPEC, task=name, learning_rate=0.01, batch_size=32, steps=50))
    assert result.series["final/accuracy"].values[-1] > 0.85


def test_batch_of_one_is_undefined_for_statistics_over_the_batch_alone():
    alone = dataclasses.replace(SPEC, batch_size=1, steps=1)
    for norm, status in (("batch-per-step", "undefined"), ("layer", "done"), ("batch-input", "done")):
        assert run(dataclasses.replace(alone, norm=norm)).status == status


@pytest.mark.parametrize("name", [*RECURRENT, "transformer"])
def test_looking_over_time_leaves_the_model_and_the_random_state_as_they_were(name):
    task = load_task(name).task
    model = task.model("batch-per-step" if name in RECURRENT else "batch", 0).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    watch.Probe(task, 64).over_time(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("norm", ["none", "layer"])
def test_norms_that_do_not_look_at_the_batch_are_the_same_over_time_in_both_modes(task, norm):
    found = watch.Probe(task, 4).over_time(task.model(norm, 0).train())
    for name in ("summed", "unnormalized", "gradient"):
        assert found[f"{name}/train"] == pytest.approx(found[f"{name}/eval"], rel=1e-4)


@pytest.mark.parametrize(("norm", "sees_padding"), [("batch", True), ("batch-masked", False), ("layer", False)])
def test_more_padding_matters_to_batch_norm_without_a_mask_alone(norm, sees_padding):
    task = load_task("transformer").task
    batch = batch_of(task)
    padded = Batch(nn.functional.pad(batch.inputs, (0, 0, 0, 20)), batch.targets, batch.lengths)
    model = task.model(norm, 0).train()
    with torch.no_grad():
        change = (task.forward(model, padded) - task.forward(model, batch)).abs().max()
        alike = task.forward(model.eval(), padded) - task.forward(model, batch)
    assert (change > 0.1) if sees_padding else (change < 1e-5)
    assert alike.abs().max() < 1e-5  # running statistics know of no padding


def test_places_are_those_of_the_paper():
    table = places(30, 8)
    assert table.shape == (30, 8)
    assert table[0].tolist() == [0, 1] * 4
    assert table[7, 2].item() == pytest.approx(torch.sin(torch.tensor(7 / 10000 ** (2 / 8))).item(), abs=1e-6)
