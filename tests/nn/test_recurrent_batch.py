"""Batch norm inside a recurrence: statistics per step and per sequence, running tables, training and evaluation."""

from __future__ import annotations

import warnings

import pytest
import torch

import normwise
from normwise.backends.reference.sequences import reverse
from support.recurrences import BATCH, run_batch
from support.recurrent_cases import LAYERS, away_from_start
from support.tolerances import assert_close

T, B, INPUT, HIDDEN = 5, 4, 3, 6
LENGTHS = [5, 2, 4, 3]


def weights(layer, suffix="_l0"):
    return {k.removesuffix(suffix): v for k, v in layer.named_parameters() if k.endswith(suffix)}


def zeros(cell):
    return tuple(torch.zeros(B, HIDDEN, dtype=torch.float64) for _ in range(2 if cell == "lstm" else 1))


def build(cell, name, **options):
    return LAYERS[cell](INPUT, HIDDEN, norm="batch", variant=name, dtype=torch.float64, **options)


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize(("cell", "name"), BATCH)
def test_training_normalizes_by_the_step_and_moves_that_steps_row(cell, name, backwards):
    layer = build(cell, name, num_stat_steps=T, bidirectional=backwards, momentum=0.3)
    suffix = "_l0_reverse" if backwards else "_l0"
    x = torch.randn(T, B, INPUT, dtype=torch.float64)
    output, _ = layer(x, lengths=LENGTHS)
    lengths = torch.tensor(LENGTHS)
    given = reverse(x, lengths) if backwards else x
    expected, _, used = run_batch(cell, name, given, zeros(cell), weights(layer, suffix), LENGTHS)
    expected = reverse(expected, lengths) if backwards else expected
    assert_close(output[..., HIDDEN if backwards else 0 :][..., :HIDDEN], expected, kind="composed", scale=1.0)
    assert set(used) == {"ih"} | ({"hh"} if name == "cooijmans2016" else set()) | (
        {"c"} if (cell, name) == ("lstm", "cooijmans2016") else set()
    )
    for site, steps in used.items():
        means, variances = (getattr(layer, f"running_{what}_{site}{suffix}") for what in ("mean", "var"))
        for t, (mean, var, n) in enumerate(steps):
            moved = n > 1  # a single sample left has no deviation
            assert_close(means[t], 0.3 * mean if moved else 0 * mean, kind="composed", scale=1.0)
            assert_close(variances[t], 0.7 + 0.3 * var * n / (n - 1) if moved else 1 + 0 * var, kind="composed")


@pytest.mark.parametrize("cell", LAYERS)
def test_sequence_wise_statistics_fill_one_row(cell):
    layer = build(cell, "laurent2015", statistics="sequence", momentum=1.0)
    x = torch.randn(T, B, INPUT, dtype=torch.float64)
    output, _ = layer(x, lengths=LENGTHS)
    expected, _, used = run_batch(cell, "laurent2015", x, zeros(cell), weights(layer), LENGTHS, sequence=True)
    assert_close(output, expected, kind="composed", scale=1.0)
    ((mean, var, n),) = used["ih"]
    assert n == sum(LENGTHS)
    assert_close(layer.running_mean_ih_l0, mean[None], kind="composed", scale=1.0)
    assert_close(layer.running_var_ih_l0, (var * n / (n - 1))[None], kind="composed", scale=1.0)


@pytest.mark.parametrize(("cell", "name"), BATCH)
def test_evaluation_after_one_full_batch_is_that_batch(cell, name):
    """With momentum 1 the tables are the batch's statistics, up to the unbiased variance."""
    layer = build(cell, name, momentum=1.0, num_stat_steps=T)
    x = torch.randn(T, 64, INPUT, dtype=torch.float64)
    trained, _ = layer(x)
    with torch.no_grad():
        for key, value in layer.named_buffers():
            if "var" in key:
                value.mul_(63 / 64)
    before = {key: value.clone() for key, value in layer.named_buffers()}
    evaluated, _ = layer.eval()(x)
    assert_close(evaluated, trained, kind="composed", scale=1.0)
    assert all(torch.equal(value, before[key]) for key, value in layer.named_buffers())


def test_steps_beyond_num_stat_steps_use_the_last_row_and_say_so_once():
    layer = away_from_start(build("lstm", "cooijmans2016", num_stat_steps=2)).eval()
    longer = build("lstm", "cooijmans2016", num_stat_steps=T).eval()
    rows = torch.tensor([0, 1, 1, 1, 1])
    state = layer.state_dict()
    longer.load_state_dict({k: v[rows] if k.startswith("running") else v for k, v in state.items()})
    x = torch.randn(T, B, INPUT, dtype=torch.float64)
    with pytest.warns(UserWarning, match="5 steps is longer than num_stat_steps=2: all later steps use the last step"):
        output, _ = layer(x)
    assert_close(output, longer(x)[0], kind="composed", scale=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x)


def test_num_stat_steps_1_shares_statistics_among_all_steps_without_a_warning():
    layer = build("rnn", "cooijmans2016", num_stat_steps=1, momentum=0.5)
    x = torch.randn(T, B, INPUT, dtype=torch.float64)
    layer(x)
    _, _, used = run_batch("rnn", "cooijmans2016", x, zeros("rnn"), weights(layer), [T] * B)
    expected = torch.zeros(HIDDEN, dtype=torch.float64)
    for mean, _, _ in used["hh"]:
        expected = 0.5 * expected + 0.5 * mean
    assert_close(layer.running_mean_hh_l0[0], expected, kind="composed", scale=1.0)
    layer.eval().step(x[0])  # needs no t


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("call", [{}, {"lengths": [5]}, {"lengths": [3, 0, 0]}])
def test_a_batch_of_one_in_training_names_the_ways_out(call, backend):
    layer = build("gru", "cooijmans2016")
    before = {key: value.clone() for key, value in layer.named_buffers()}
    x = torch.randn(T, len(call.get("lengths", [0])), INPUT, dtype=torch.float64)
    with (
        normwise.backend(backend),
        pytest.raises(ValueError, match=r"Expected more than 1 value per channel.*norm='layer' or 'rms'.*drop_last"),
    ):
        layer(x, **call)
    assert all(torch.equal(value, before[key]) for key, value in layer.named_buffers())
    assert layer.eval()(x, **call)[0].shape == (T, x.shape[1], HIDDEN)


def test_a_single_sequence_is_enough_for_sequence_wise_statistics():
    layer = build("rnn", "laurent2015", statistics="sequence")
    layer(torch.randn(T, 1, INPUT, dtype=torch.float64))
    with pytest.raises(ValueError, match="Expected more than 1 value"):
        layer(torch.randn(1, 1, INPUT, dtype=torch.float64))


def test_the_last_sample_running_gets_a_zero_and_moves_nothing():
    layer = build("rnn", "laurent2015", momentum=1.0, num_stat_steps=T)
    x = torch.randn(T, 2, INPUT, dtype=torch.float64)
    output, _ = layer(x, lengths=[5, 3])
    for t in (3, 4):
        w = weights(layer)
        expected = torch.tanh(w["bias_ih"] + w["weight_hh"] @ output[t - 1, 0])
        assert_close(output[t, 0], expected, kind="composed", scale=1.0)
        assert (layer.running_var_ih_l0[t] == 1).all()
        assert (layer.running_mean_ih_l0[t] == 0).all()


@pytest.mark.parametrize("cell", LAYERS)
def test_steps_in_training_move_their_own_rows(cell):
    whole, stepped = (build(cell, "cooijmans2016", num_stat_steps=3) for _ in range(2))
    stepped.load_state_dict(whole.state_dict())
    x = torch.randn(3, B, INPUT, dtype=torch.float64)
    output, _ = whole(x)
    state = None
    for t in range(3):
        y, state = stepped.step(x[t], state, step=t)
        assert_close(y, output[t], kind="composed", scale=1.0)
    for (key, a), b in zip(stepped.named_buffers(), whole.buffers(), strict=True):
        assert_close(a, b, kind="composed", scale=1.0, name=key)


def test_a_cell_moves_its_own_rows_too():
    layer = build("gru", "cooijmans2016", num_stat_steps=3)
    cell = normwise.GRUCell(INPUT, HIDDEN, norm="batch", num_stat_steps=3, dtype=torch.float64)
    cell.load_state_dict({k.removesuffix("_l0"): v for k, v in layer.state_dict().items()})
    x = torch.randn(2, B, INPUT, dtype=torch.float64)
    layer(x)
    h = cell(x[0], step=0)
    cell(x[1], h, step=1)
    assert_close(cell.running_mean_hh, layer.running_mean_hh_l0, kind="composed", scale=1.0)
    assert (cell.running_mean_hh[2] == 0).all()


def test_reset_parameters_clears_the_tables():
    layer = build("lstm", "cooijmans2016")
    layer(torch.randn(T, B, INPUT, dtype=torch.float64))
    layer.reset_parameters()
    assert (layer.running_mean_c_l0 == 0).all()
    assert (layer.running_var_ih_l0 == 1).all()


@pytest.mark.parametrize("cell", LAYERS)
def test_an_empty_batch_moves_nothing(cell):
    layer = build(cell, "cooijmans2016")
    output, _ = layer(torch.zeros(T, 0, INPUT, dtype=torch.float64))
    assert output.shape == (T, 0, HIDDEN)
    assert (layer.running_mean_hh_l0 == 0).all()
    assert (layer.running_var_hh_l0 == 1).all()
