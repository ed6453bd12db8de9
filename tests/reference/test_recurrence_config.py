"""The description of a recurrence: what it accepts, which parameters it asks for, and how presets are found."""

from __future__ import annotations

import pickle

import pytest

from normwise.backends.recurrence import Recurrence, Weights
from normwise.ops.rnn.presets import PRESETS, preset


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cell": "lstmp"}, r"cell='lstmp' is not known: expected one of 'lstm', 'gru', 'rnn'"),
        ({"norm": "group"}, r"norm='group' is not known: expected one of 'layer', 'rms', 'batch', None"),
        ({"norm_placement": "both"}, r"norm_placement='both' is not known"),
        ({"statistics": "per-step"}, r"statistics='per-step' is not known: .*; did you mean 'per_step'\?"),
        ({"groups": (2, 1)}, r"groups=\(2, 1\) must be positive and add up to the 4 gates .* i, f, g, o"),
        ({"groups": (5, -1)}, r"must be positive"),
        ({"eps": 0.0}, r"eps must be positive, but got 0.0"),
        ({"eps": float("nan")}, r"eps must be positive"),
        ({"zoneout": 1.5}, r"zoneout is a probability in \[0, 1\], but got 1.5"),
        ({"cell": "gru", "cell_norm": "readout"}, r"needs a cell state, which a gru cell has not"),
        ({"cell": "rnn", "forget_bias": 1.0}, r"needs a forget gate, which a rnn cell has not"),
        ({"cell": "gru", "norm_placement": "sum"}, r"no hidden term for the reset gate .* reset_after=False"),
        ({"inner_bias": True}, r"needs norm_placement='sum'"),
        ({"norm": None, "cell_norm": "readout"}, r"belong to a norm, but norm=None has none"),
        ({"statistics": "sequence"}, r"only for batch norm on the input term alone"),
        (
            {"norm": "batch", "norm_placement": "input", "cell_norm": "readout", "statistics": "sequence"},
            r"on the input term alone",
        ),
        ({"norm": "batch", "statistics": "sequence"}, r"variant='laurent2015'"),
    ],
)
def test_a_description_that_cannot_be_says_why(options, message):
    with pytest.raises(ValueError, match=message):
        Recurrence(**{"cell": "lstm", **options})


def test_parameters_follow_the_description():
    shapes = PRESETS["lstm"]["ba2016"].shapes(3, 5, proj_size=2)
    assert shapes == {
        "weight_ih": (20, 3),
        "weight_hh": (20, 2),
        "bias_ih": (20,),
        "bias_hh": (20,),
        "weight_hr": (2, 5),
        "gain_ih": (20,),
        "gain_hh": (20,),
        "gain_c": (5,),
        "bias_c": (5,),
    }
    assert list(PRESETS["gru"]["dreamer"].shapes(3, 5)) == ["weight_ih", "weight_hh", "bias_ih", "gain_sum"]
    assert list(PRESETS["gru"]["laurent2015"].shapes(3, 5, bias=False)) == ["weight_ih", "weight_hh", "gain_ih"]
    assert list(Recurrence("rnn", None).shapes(3, 5)) == ["weight_ih", "weight_hh", "bias_ih", "bias_hh"]


def test_every_parameter_that_a_preset_asks_for_is_a_weight():
    for presets in PRESETS.values():
        for config in presets.values():
            assert set(config.shapes(3, 5, proj_size=2)) <= set(Weights._fields)


def test_rms_takes_the_place_of_layer_norm_and_has_no_norm_bias():
    assert preset("lstm", "rms") == Recurrence("lstm", "rms", cell_norm="readout", cell_bias=False)
    assert "bias_c" not in preset("lstm", "rms", "haste").shapes(3, 5)


def test_defaults():
    assert preset("lstm", "layer") == PRESETS["lstm"]["ba2016"]
    assert preset("gru", "batch") == PRESETS["gru"]["cooijmans2016"]
    assert preset("rnn", None) == Recurrence("rnn", None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("lstm", "layer", "fastrnn"), r"unknown variant 'fastrnn' for lstm: .*'ba2016'.* Nearest: 'fastrnns'"),
        (("lstm", "layer", "dreamer"), r"variant='dreamer' exists for gru, not for lstm: expected one of 'ba2016'"),
        (("rnn", "layer", "haste"), r"exists for lstm and gru, not for rnn"),
        (("lstm", "layer", "cooijmans2016"), r"with batch normalization, but norm='layer': pass norm='batch'"),
        (("gru", "batch", "ba2016"), r"with layer normalization.*or one of 'laurent2015', 'cooijmans2016'"),
        (("lstm", "instance", None), r"norm='instance' is not known: expected 'layer', 'rms', 'batch' or None$"),
        (("lstm", "layernorm", None), r"norm='layernorm' is not known: .* or None; did you mean 'layer'\?"),
        (("gru", "Batch", None), r"norm='Batch' is not known: .* or None; did you mean 'batch'\?"),
        (("lstm", None, "ba2016"), r"norm=None has none"),
    ],
)
def test_a_preset_that_cannot_be_found_says_which_can(arguments, message):
    with pytest.raises(ValueError, match=message):
        preset(*arguments)


def test_descriptions_are_values():
    config = PRESETS["gru"]["dreamer"]
    assert pickle.loads(pickle.dumps(config)) == config
    assert hash(config) == hash(pickle.loads(pickle.dumps(config)))
