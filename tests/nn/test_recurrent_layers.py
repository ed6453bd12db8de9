"""Stacks of normalized recurrent layers against the equations, and everything a call can be given."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import normwise
from normwise.ops.rnn.presets import PRESETS
from support.recurrences import EQUATIONS, run
from support.recurrent_cases import CELLS, LAYERS, away_from_start
from support.tolerances import assert_close

T, B, INPUT, HIDDEN = 5, 3, 4, 6
TORCH = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
KINDS = [(cell, norm) for cell in LAYERS for norm in ("layer", "rms", "batch")]


def build(cell, *args, **options):
    return away_from_start(LAYERS[cell](INPUT, HIDDEN, *args, dtype=torch.float64, **options))


def parts(state):
    return list(state) if isinstance(state, tuple) else [state]


def joined(states):
    return tuple(states) if len(states) == 2 else states[0]


def random_state(layer, batch=B):
    count = layer.num_layers * (1 + layer.bidirectional)
    sizes = [layer.proj_size or HIDDEN] + ([HIDDEN] if layer.cell == "lstm" else [])
    return joined([torch.randn(count, batch, size, dtype=torch.float64) for size in sizes])


def weights(layer, suffix):
    return {k.removesuffix(suffix): v for k, v in layer.named_parameters() if k.endswith(suffix)}


def all_close(actual, expected, **options):
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, kind="composed", scale=1.0, **options)


@pytest.mark.parametrize(
    ("cell", "name", "proj_size"),
    [(cell, name, 0) for cell, name in EQUATIONS] + [("lstm", name, 2) for cell, name in EQUATIONS if cell == "lstm"],
)
def test_two_layers_in_two_directions_are_the_equations(cell, name, proj_size):
    options = {"proj_size": proj_size} if proj_size else {}
    layer = build(cell, 2, bidirectional=True, variant=name, **options)
    x, state = torch.randn(T, B, INPUT, dtype=torch.float64), random_state(layer)
    output, finals = layer(x, state)
    below, expected = x, []
    for k in range(2):
        sides = []
        for d, suffix in enumerate((f"_l{k}", f"_l{k}_reverse")):
            given = tuple(s[2 * k + d] for s in parts(state))
            turned = below.flip(0) if d else below
            out, final = run(cell, name, turned, given, weights(layer, suffix))
            sides.append(out.flip(0) if d else out)
            expected.append(final)
        below = torch.cat(sides, -1)
    all_close([output], [below])
    all_close(parts(finals), [torch.stack(s) for s in zip(*expected, strict=True)])


@pytest.mark.parametrize(("cell", "norm"), KINDS)
def test_batch_first_only_turns_input_and_output(cell, norm):
    layer = build(cell, 2, bidirectional=True, norm=norm).eval()
    turned = build(cell, 2, bidirectional=True, norm=norm, batch_first=True).eval()
    turned.load_state_dict(layer.state_dict())
    x, state = torch.randn(T, B, INPUT, dtype=torch.float64), random_state(layer)
    lengths, reset = torch.tensor([2, 5, 4]), torch.rand(T, B) < 0.3
    output, finals = layer(x, state, lengths=lengths, reset=reset)
    other, other_finals = turned(x.transpose(0, 1), state, lengths=lengths, reset=reset.T)
    assert torch.equal(other.transpose(0, 1), output)
    for a, b in zip(parts(finals), parts(other_finals), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(("cell", "norm"), KINDS)
def test_unbatched_is_a_batch_of_one(cell, norm, batch_first):
    layer = build(cell, 2, bidirectional=True, norm=norm, batch_first=batch_first).eval()
    x, state = torch.randn(T, INPUT, dtype=torch.float64), random_state(layer, 1)
    reset = torch.tensor([False, False, True, False, False])
    output, finals = layer(x, joined([s[:, 0] for s in parts(state)]), lengths=[4], reset=reset)
    axis = 0 if batch_first else 1
    wide, wide_finals = layer(x.unsqueeze(axis), state, lengths=[4], reset=reset.unsqueeze(axis))
    assert torch.equal(output, wide.squeeze(axis))
    for a, b in zip(parts(finals), parts(wide_finals), strict=True):
        assert torch.equal(a, b[:, 0])


PRESETS_AND_NORMS = [(cell, name, config.norm) for cell, presets in PRESETS.items() for name, config in presets.items()]


@pytest.mark.parametrize(
    ("cell", "name", "norm"),
    PRESETS_AND_NORMS + [(cell, None, norm) for cell in LAYERS for norm in ("rms", None)],
)
def test_steps_are_the_sequence(cell, name, norm):
    layer = build(cell, 2, norm=norm, variant=name).eval()
    x, state = torch.randn(T, B, INPUT, dtype=torch.float64), random_state(layer)
    reset = torch.rand(T, B) < 0.3
    output, finals = layer(x, state, reset=reset)
    for t in range(T):
        y, state = layer.step(x[t], state, reset=reset[t], step=t)
        all_close([y], [output[t]])
    all_close(parts(state), parts(finals))


@pytest.mark.parametrize("cell", LAYERS)
def test_a_step_without_a_batch_and_without_a_state(cell):
    layer = build(cell, 2)
    x = torch.randn(T, INPUT, dtype=torch.float64)
    output, finals = layer(x)
    state = None
    for t in range(T):
        y, state = layer.step(x[t], state)
        all_close([y], [output[t]])
    all_close(parts(state), parts(finals))
    y, _ = layer.step(x[0], state, reset=torch.tensor(True))
    all_close([y], [output[0]])


@pytest.mark.parametrize("norm", ["layer", "rms", "batch", None])
@pytest.mark.parametrize("cell", CELLS)
def test_a_cell_is_a_step_of_the_layer(cell, norm):
    layer = build(cell, norm=norm).eval()
    one = CELLS[cell](INPUT, HIDDEN, dtype=torch.float64, norm=norm).eval()
    one.load_state_dict({k.removesuffix("_l0"): v for k, v in layer.state_dict().items()})
    x, state = torch.randn(B, INPUT, dtype=torch.float64), random_state(layer)
    _, finals = layer.step(x, state, step=3)
    got = parts(one(x, joined([s[0] for s in parts(state)]), step=3))
    all_close(got, [s[0] for s in parts(finals)])
    alone = parts(one(x[0], joined([s[0, 0] for s in parts(state)]), step=3))
    all_close(alone, [s[0] for s in got])


@pytest.mark.parametrize("norm", ["layer", "rms", None])
@pytest.mark.parametrize("cell", LAYERS)
def test_a_reset_cuts_all_layers_and_both_directions(cell, norm):
    layer = build(cell, 2, bidirectional=True, norm=norm)
    x = torch.randn(T, B, INPUT, dtype=torch.float64)
    reset = torch.zeros(T, B, dtype=torch.bool)
    reset[2] = True
    output, _ = layer(x, reset=reset)
    all_close([output], [torch.cat([layer(x[:2])[0], layer(x[2:])[0]])])


def test_dropout_acts_between_layers_and_only_in_training():
    layer = normwise.GRU(INPUT, HIDDEN, 2, dropout=0.5, dtype=torch.float64)
    x = torch.randn(T, B, INPUT, dtype=torch.float64)
    torch.manual_seed(3)
    output, _ = layer(x)
    below = normwise.GRU(INPUT, HIDDEN, dtype=torch.float64)
    above = normwise.GRU(HIDDEN, HIDDEN, dtype=torch.float64)
    for k, single in enumerate((below, above)):
        single.load_state_dict({f"{n}_l0": v for n, v in weights(layer, f"_l{k}").items()})
    torch.manual_seed(3)
    expected, _ = above(nn.functional.dropout(below(x)[0], 0.5))
    all_close([output], [expected])
    all_close([layer.eval()(x)[0]], [above(below(x)[0])[0]])


def test_zoneout_draws_in_training_only():
    layer = normwise.LSTM(INPUT, HIDDEN, variant="haste", zoneout=0.5, dtype=torch.float64)
    x, h0 = torch.randn(40, B, INPUT, dtype=torch.float64), torch.randn(1, B, HIDDEN, dtype=torch.float64)
    output, _ = layer(x, (h0, torch.zeros_like(h0)))
    kept = (output == torch.cat([h0, output[:-1]])).double().mean().item()
    assert 0.4 < kept < 0.6
    layer.eval()
    assert torch.equal(layer(x)[0], layer(x)[0])


@pytest.mark.parametrize("variant", list(PRESETS["lstm"]))
def test_from_torch_starts_from_a_plain_layers_weights(variant):
    norm = PRESETS["lstm"][variant].norm
    given = nn.LSTM(INPUT, HIDDEN, 2, bidirectional=True, proj_size=2, batch_first=True, dtype=torch.float64)
    layer = normwise.LSTM.from_torch(given, norm=norm, variant=variant)
    ours, theirs = layer.state_dict(), given.state_dict()
    for suffix in ("_l0", "_l1_reverse"):
        for name in ("weight_ih", "weight_hh", "weight_hr"):
            assert torch.equal(ours[name + suffix], theirs[name + suffix])
        total = theirs["bias_ih" + suffix] + theirs["bias_hh" + suffix]
        assert torch.equal(ours["bias_ih" + suffix] + ours.get("bias_hh" + suffix, 0), total)
    assert layer.batch_first
    assert layer(torch.randn(B, T, INPUT, dtype=torch.float64))[0].shape == (B, T, 4)


def test_from_torch_keeps_an_rnns_nonlinearity():
    layer = normwise.RNN.from_torch(nn.RNN(INPUT, HIDDEN, nonlinearity="relu", bias=False))
    assert layer.nonlinearity == layer.recurrence.nonlinearity == "relu"
    assert (layer(torch.randn(T, B, INPUT))[0] >= 0).all()


def test_parameters_start_where_the_preset_says():
    layer = normwise.LSTM(INPUT, HIDDEN, 2, variant="tfa")
    assert (layer.gain_ih_l1 == 1).all()
    assert (layer.bias_c_l0 == 0).all()
    assert layer.bias_ih_l0.view(4, HIDDEN).sum(1).tolist() == [0, HIDDEN, 0, 0]
    assert (layer.bias_hh_l0 == 0).all()
    bound = HIDDEN**-0.5
    assert layer.weight_hh_l1.abs().max() <= bound
    assert layer.weight_hh_l1.std().item() == pytest.approx(bound / 3**0.5, rel=0.2)
    assert (normwise.LSTM(INPUT, HIDDEN, forget_bias=2.0).bias_ih_l0[HIDDEN : 2 * HIDDEN] == 2).all()
    assert (normwise.GRU(INPUT, HIDDEN, norm="batch").gain_hh_l0 == 0.1).all()
    with torch.no_grad():
        layer.gain_ih_l1.zero_()
    layer.reset_parameters()
    assert (layer.gain_ih_l1 == 1).all()


def test_what_a_layer_prints():
    text = repr(normwise.LSTM(4, 6, 2, bidirectional=True, proj_size=3))
    assert text == "LSTM(4, 6, proj_size=3, num_layers=2, bidirectional=True, norm='layer', variant='ba2016')"
    assert "norm='batch', variant='laurent2015', num_stat_steps=9" in repr(
        normwise.RNN(4, 6, norm="batch", variant="laurent2015", num_stat_steps=9)
    )
    assert repr(normwise.GRUCell(4, 6, norm="rms")) == "GRUCell(4, 6, norm='rms', variant='ba2016')"


@pytest.mark.parametrize("cell", LAYERS)
@pytest.mark.parametrize("norm", ["layer", None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_default_device_is_not_that_of_the_input(cell, norm, dtype):
    layer = LAYERS[cell](INPUT, HIDDEN, norm=norm, bidirectional=True, dtype=dtype)
    x, reset = torch.randn(T, B, INPUT, dtype=dtype, requires_grad=True), torch.rand(T, B) < 0.3
    for options in ({}, {"lengths": [5, 2, 1]}, {"reset": reset}):
        results = []
        for device in ("cpu", "meta"):
            with torch.device(device):
                output = layer(x, **options)[0]
                results.append([output, *torch.autograd.grad(output.square().sum(), [x, *layer.parameters()])])
        assert all(torch.equal(here, there) for here, there in zip(*results, strict=True))
