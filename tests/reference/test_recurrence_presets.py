"""The reference loop against equations written out in the test, and against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from normwise.backends.recurrence import Recurrence, Weights
from normwise.backends.reference.recurrence import recurrence
from normwise.ops.rnn.presets import PRESETS, preset
from support.recurrences import BATCH, EQUATIONS, random_weights, run, run_batch
from support.tolerances import assert_close

T, B, INPUT, HIDDEN = 5, 4, 3, 6


def sample(config, proj_size=0, bias=True):
    weights = random_weights(config.shapes(INPUT, HIDDEN, proj_size=proj_size, bias=bias))
    x = torch.randn(T, B, INPUT, dtype=torch.float64)
    h0 = torch.randn(B, proj_size or HIDDEN, dtype=torch.float64)
    c0 = torch.randn(B, HIDDEN, dtype=torch.float64) if config.cell == "lstm" else None
    leaves = [x, h0, *([] if c0 is None else [c0]), *weights.values()]
    return x, h0, c0, weights, [leaf.requires_grad_() for leaf in leaves]


def states(h0, c0):
    return (h0,) if c0 is None else (h0, c0)


def compare(actual, expected, leaves):
    """Outputs, final states, and the gradients that random upstream gradients on all of them give."""
    upstream = [torch.randn_like(a) for a in actual]
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, kind="composed")
    got, want = (torch.autograd.grad(out, leaves, upstream, allow_unused=True) for out in (actual, expected))
    for a, e in zip(got, want, strict=True):
        assert (a is None) == (e is None)
        if a is not None:
            assert_close(a, e, kind="composed", count=T, scale=max(1.0, e.abs().max().item()))


def test_the_equations_cover_every_preset():
    named = {(cell, name) for cell, presets in PRESETS.items() for name in presets}
    assert named == {*EQUATIONS, *BATCH}


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize(("cell", "name"), EQUATIONS)
def test_a_preset_is_its_equations(cell, name, norm):
    config = preset(cell, norm, name)
    x, h0, c0, w, leaves = sample(config)
    result = recurrence(x, h0, c0, Weights(**w), config)
    output, finals = run(cell, name, x, states(h0, c0), w, norm)
    compare([result.output, *states(result.h, result.c)], [output, *finals], leaves)


@pytest.mark.parametrize("name", [n for n, p in PRESETS["lstm"].items() if p.norm == "layer"])
def test_a_projection_stands_after_the_output(name):
    config = preset("lstm", "layer", name)
    x, h0, c0, w, leaves = sample(config, proj_size=2)
    result = recurrence(x, h0, c0, Weights(**w), config)
    output, finals = run("lstm", name, x, (h0, c0), w)
    compare([result.output, result.h, result.c], [output, *finals], leaves)


@pytest.mark.parametrize(("cell", "name"), EQUATIONS)
def test_without_biases(cell, name):
    config = preset(cell, "layer", name)
    x, h0, c0, w, leaves = sample(config, bias=False)
    assert not [key for key in w if key.startswith("bias")]
    result = recurrence(x, h0, c0, Weights(**w), config)
    output, finals = run(cell, name, x, states(h0, c0), w)
    compare([result.output, *states(result.h, result.c)], [output, *finals], leaves)


def test_the_paper_and_its_code_blend_a_gru_the_opposite_way():
    config = Recurrence("gru", groups=(2, 1), update_gate="paper")
    x, h0, _, w, leaves = sample(config)
    result = recurrence(x, h0, None, Weights(**w), config)
    output, finals = run("gru", "ba2016", x, (h0,), w, paper=True)
    compare([result.output, result.h], [output, *finals], leaves)


@pytest.mark.parametrize("lengths", [[T] * B, [5, 2, 4, 3]])
@pytest.mark.parametrize(("cell", "name"), BATCH)
def test_a_batch_preset_is_its_equations_over_the_samples_still_running(cell, name, lengths):
    config = preset(cell, "batch", name)
    x, h0, c0, w, leaves = sample(config)
    result = recurrence(x, h0, c0, Weights(**w), config, lengths=torch.tensor(lengths))
    output, finals, used = run_batch(cell, name, x, states(h0, c0), w, lengths)
    compare([result.output, *states(result.h, result.c)], [output, *finals], leaves)
    assert set(result.statistics) == set(used)
    for site, steps in used.items():
        moments = result.statistics[site]
        assert_close(moments.mean, torch.stack([m for m, _, _ in steps]), scale=1.0)
        assert_close(moments.var, torch.stack([v for _, v, _ in steps]), scale=1.0)
        assert moments.count.flatten().tolist() == [n for _, _, n in steps]
        assert not moments.mean.requires_grad


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_sequence_wise_statistics_are_over_batch_and_time(cell):
    lengths = [5, 2, 4, 1]
    config = Recurrence(cell, "batch", "input", hidden_bias=cell == "gru", statistics="sequence")
    x, h0, c0, w, leaves = sample(config)
    result = recurrence(x, h0, c0, Weights(**w), config, lengths=torch.tensor(lengths))
    output, finals, used = run_batch(cell, "laurent2015", x, states(h0, c0), w, lengths, sequence=True)
    compare([result.output, *states(result.h, result.c)], [output, *finals], leaves)
    assert_close(result.statistics["ih"].var[0], used["ih"][0][1])
    assert result.statistics["ih"].count.item() == sum(lengths)


def test_given_statistics_are_read_row_by_row_and_the_last_row_serves_all_later_steps():
    config = Recurrence("rnn", "batch", "input", hidden_bias=False)
    w = {"weight_ih": torch.eye(2).double(), "weight_hh": torch.zeros(2, 2).double(), "gain_ih": torch.ones(2).double()}
    mean = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).double()
    var = torch.tensor([[4.0, 4.0], [9.0, 9.0]], dtype=torch.float64) - 1e-5
    x = torch.full((4, 1, 2), 7.0).double()
    h0 = torch.zeros(1, 2).double()
    first = recurrence(x, h0, None, Weights(**w), config, running={"ih": (mean, var)}).output[:, 0]
    expected = torch.tensor([[3.0, 2.5], [4 / 3, 1.0], [4 / 3, 1.0], [4 / 3, 1.0]], dtype=torch.float64).tanh()
    assert_close(first, expected)
    later = recurrence(x, h0, None, Weights(**w), config, running={"ih": (mean, var)}, start_step=1).output[:, 0]
    assert_close(later, expected[[1, 1, 1, 1]])


# Numbers worked out by hand. All weights are chosen so that each summed input normalizes to +-1 (two features) or
# to the values of +-1 that the gates need: s(1) = 0.7310585786, s(-1) = 0.2689414214, tanh(1) = 0.7615941560.
S, TANH = 1 / (1 + math.exp(-1)), math.tanh(1)


def by_hand(config, x, w, h0, c0=None):
    as64 = {k: torch.tensor(v, dtype=torch.float64) for k, v in w.items()}
    x, h0 = torch.tensor([[x]], dtype=torch.float64), torch.tensor([h0], dtype=torch.float64)
    c0 = None if c0 is None else torch.tensor([c0], dtype=torch.float64)
    result = recurrence(x, h0, c0, Weights(**as64), config)
    return result.h[0].tolist(), None if result.c is None else result.c[0].tolist()


TINY = 1e-12  # so small an eps leaves the numbers as they are on paper


@pytest.mark.parametrize(
    ("name", "expected_h", "expected_c"),
    [
        # Input term (i, f, g, o) of two units: rows 1 and -1 alternate, so LN leaves them: i = f = g = o = (1, -1)
        # from the input, and the hidden term is 0 (h = 0). c' = s*c + s*tanh = (2s + s*t, -(1-s)*t - 2(1-s)).
        ("ba2016", [S * TANH, -(1 - S) * TANH], [2 * S + S * TANH, -2 * (1 - S) - (1 - S) * TANH]),
        ("haste", [S * TANH, -(1 - S) * TANH], [2 * S + S * TANH, -2 * (1 - S) - (1 - S) * TANH]),
        # The same gates, but the normalized cell (1, -1) is what is carried on.
        ("fastrnns", [S * TANH, -(1 - S) * TANH], [1.0, -1.0]),
        ("tfa", [S * TANH, -(1 - S) * TANH], [1.0, -1.0]),
        ("torchaudio", [S * TANH, -(1 - S) * TANH], [1.0, -1.0]),
        ("per_gate", [S * TANH, -(1 - S) * TANH], [1.0, -1.0]),
        ("icefall", [S * TANH, -(1 - S) * TANH], [1.0, -1.0]),
    ],
)
def test_one_lstm_step_by_hand(name, expected_h, expected_c):
    config = Recurrence(**{**vars(PRESETS["lstm"][name]), "eps": TINY})
    w = {k: torch.ones(s).tolist() for k, s in config.shapes(1, 2, bias=False).items()}
    w["weight_ih"] = [[3.0], [-3.0]] * 4
    w["weight_hh"] = [[0.5, 0.5]] * 8
    h, c = by_hand(config, [2.0], w, [0.0, 0.0], [2.0, -2.0])
    assert h == pytest.approx(expected_h, rel=1e-9)
    assert c == pytest.approx(expected_c, rel=1e-9)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # r = z = n = (1, -1) from the input alone (W_hh = 0): n = tanh(1, -1), z = (s, 1-s), h = (1, 1).
        ("ba2016", [S + (1 - S) * TANH, (1 - S) - S * TANH]),
        ("haste", [S + (1 - S) * TANH, (1 - S) - S * TANH]),
        # n = tanh(s(r) * 1), u = s(z - 1) = s(0) = 1/2 for the first unit and s(-2) for the second.
        (
            "dreamer",
            [
                0.5 * math.tanh(S) + 0.5,
                (u := 1 / (1 + math.exp(2))) * math.tanh(-(1 - S)) + (1 - u),
            ],
        ),
    ],
)
def test_one_gru_step_by_hand(name, expected):
    config = Recurrence(**{**vars(PRESETS["gru"][name]), "eps": TINY})
    w = {k: torch.ones(s).tolist() for k, s in config.shapes(1, 2, bias=False).items()}
    w["weight_ih"] = [[3.0], [-3.0]] * 3
    w["weight_hh"] = [[0.0, 0.0]] * 6
    assert by_hand(config, [2.0], w, [1.0, 1.0])[0] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # W_ih x = (6, -6), W_hh h = (1, 3): their sum (7, -3) normalizes to (1, -1), and the bias (0, 1) comes after.
        ("ba2016", [math.tanh(1), math.tanh(0)]),
        # Apart: (1, -1) + (-1, 1) + bias = (0, 1).
        ("separate", [math.tanh(0), math.tanh(1)]),
    ],
)
def test_one_rnn_step_by_hand(name, expected):
    config = Recurrence(**{**vars(PRESETS["rnn"][name]), "eps": TINY})
    w = {k: torch.ones(s).tolist() for k, s in config.shapes(1, 2).items()}
    w |= {"weight_ih": [[3.0], [-3.0]], "weight_hh": [[1.0, 0.0], [0.0, 3.0]], "bias_ih": [0.0, 1.0]}
    assert by_hand(config, [2.0], w, [1.0, 1.0])[0] == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # Two samples, one unit: W_ih x = (1, 5) -> (-1, 1); W_hh h = 3h = (6, 0) -> (1, -1).
        ("laurent2015", [math.tanh(-1 + 6), math.tanh(1 + 0)]),
        ("cooijmans2016", [math.tanh(-0.1 + 0.1), math.tanh(0.1 - 0.1)]),
    ],
)
def test_one_batch_normalized_rnn_step_by_hand(name, expected):
    config = Recurrence(**{**vars(PRESETS["rnn"][name]), "eps": TINY})
    gain = {f"gain_{site}": torch.tensor([config.gain]).double() for site in config.sites(1)}
    w = Weights(torch.tensor([[1.0]]).double(), torch.tensor([[3.0]]).double(), **gain)
    x, h0 = torch.tensor([[[1.0], [5.0]]]).double(), torch.tensor([[2.0], [0.0]]).double()
    result = recurrence(x, h0, None, w, config)
    assert result.h.flatten().tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9)
