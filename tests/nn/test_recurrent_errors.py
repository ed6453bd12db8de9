"""Bad input to recurrent layers: what is wrong, what is accepted, and the way out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

import normwise
from normwise import Recurrence
from normwise.ops.rnn.presets import PRESETS

T, B, INPUT, HIDDEN = 5, 3, 4, 6
X = torch.zeros(T, B, INPUT)
LAYERS = [normwise.RNN, normwise.GRU, normwise.LSTM]


@pytest.mark.parametrize("norm", ["layer", "batch", None])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(
    ("x", "call", "error", "message"),
    [
        (torch.zeros(T, B, 5), {}, RuntimeError, r"input.size\(-1\) must be equal to input_size. Expected 4, got 5"),
        (torch.zeros(4), {}, ValueError, r"Expected input to be 2D or 3D, got 1D"),
        (torch.zeros(1, T, B, 4), {}, ValueError, r"Expected input to be 2D or 3D, got 4D"),
        (X.double(), {}, ValueError, r"RNN input dtype \(torch.float64\) does not match weight dtype"),
        (torch.zeros(0, B, INPUT), {}, RuntimeError, r"Expected sequence length to be larger than 0 in RNN"),
        ([[1.0]], {}, TypeError, r"expected a tensor or a PackedSequence, but got list"),
        (X, {"lengths": [1, 2]}, ValueError, r"lengths must be of shape \(3,\), one for each sample.*got \(2,\)"),
        (X, {"lengths": [1, 2, 6]}, ValueError, r"lengths must lie in \[0, 5\].*values from 1 to 6"),
        (X, {"lengths": [1, -2, 5]}, ValueError, r"lengths must lie in \[0, 5\].*values from -2 to 5"),
        (X, {"lengths": torch.ones(3)}, TypeError, r"lengths must be of an integer dtype.*use lengths.long\(\)"),
        (X, {"reset": torch.zeros(T, B)}, TypeError, r"reset must be of dtype torch.bool.*float32: use reset.bool\(\)"),
        (X, {"reset": torch.zeros(B, T).bool()}, ValueError, r"reset must be of shape \(5, 3\), steps first.*\(3, 5\)"),
    ],
)
def test_a_bad_call_is_refused(layer, norm, x, call, error, message):
    with pytest.raises(error, match=message):
        layer(INPUT, HIDDEN, norm=norm)(x, **call)


@pytest.mark.parametrize("norm", ["layer", None])
@pytest.mark.parametrize(
    ("hx", "error", "message"),
    [
        (torch.zeros(1, 2, HIDDEN), RuntimeError, r"Expected hidden size \(1, 3, 6\), got \[1, 2, 6\]"),
        (torch.zeros(1, B, 5), RuntimeError, r"Expected hidden size \(1, 3, 6\), got \[1, 3, 5\]"),
        (torch.zeros(B, HIDDEN), RuntimeError, r"For batched 3-D input, hx should also be 3-D but got 2-D tensor"),
        ((torch.zeros(1, B, HIDDEN),) * 2, TypeError, r"GRU: expected hx to be a tensor, but got tuple"),
    ],
)
def test_hidden_states(norm, hx, error, message):
    with pytest.raises(error, match=message):
        normwise.GRU(INPUT, HIDDEN, norm=norm)(X, hx)


@pytest.mark.parametrize("norm", ["layer", None])
@pytest.mark.parametrize(
    ("hx", "error", "message"),
    [
        (torch.zeros(1, B, HIDDEN), TypeError, r"LSTM: expected hx to be a pair \(h_0, c_0\), but got Tensor"),
        ((torch.zeros(1, B, 6), torch.zeros(1, B, 6)), RuntimeError, r"Expected hidden\[0\] size \(1, 3, 2\)"),
        ((torch.zeros(1, B, 2), torch.zeros(1, B, 2)), RuntimeError, r"Expected hidden\[1\] size \(1, 3, 6\)"),
        ((torch.zeros(B, 2), torch.zeros(B, 6)), RuntimeError, r"hx and cx should also be 3-D but got \(2-D, 2-D\)"),
    ],
)
def test_hidden_and_cell_states(norm, hx, error, message):
    with pytest.raises(error, match=message):
        normwise.LSTM(INPUT, HIDDEN, norm=norm, proj_size=2)(X, hx)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("norm", ["layer", "batch", None])
@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
def test_states_of_another_dtype_are_refused(name, norm, dtype):
    layer, cell = getattr(normwise, name)(INPUT, HIDDEN, norm=norm), getattr(normwise, f"{name}Cell")(INPUT, HIDDEN)
    h = torch.zeros(1, B, HIDDEN)
    state = (h, h.to(dtype)) if name == "LSTM" else h.to(dtype)
    of_cell = (h[0], h[0].to(dtype)) if name == "LSTM" else h[0].to(dtype)
    said = rf"not the same dtype, found input tensor with torch.float32 and hidden tensor with {dtype}. Convert the st"
    packed = pack_sequence([X[:, 0], X[:2, 1], X[:1, 2]])
    calls = (lambda: layer(X, state), lambda: layer(packed, state), lambda: layer.step(X[0], state, step=0))
    for call in (*calls, lambda: cell(X[0], of_cell)):
        with pytest.raises(ValueError, match=said):
            call()
    h = h.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):  # which gives inputs and states its own
        layer(X, (h, h) if name == "LSTM" else h), cell(X[0], (h[0], h[0]) if name == "LSTM" else h[0])


@pytest.mark.parametrize("norm", ["layer", None])
def test_a_packed_sequence_states_its_own_lengths(norm):
    packed = pack_sequence([X[:, 0], X[:2, 1]])
    layer = normwise.LSTM(INPUT, HIDDEN, norm=norm)
    with pytest.raises(ValueError, match=r"lengths together with a PackedSequence.*leave them out"):
        layer(packed, lengths=[5, 2])
    with pytest.raises(RuntimeError, match=r"Expected hidden\[0\] size \(1, 2, 6\)"):
        layer(packed, (torch.zeros(1, 3, 6), torch.zeros(1, 3, 6)))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: normwise.LSTM(4, 6, variant="ba16"), ValueError, r"unknown variant 'ba16'.*Nearest: 'ba2016'"),
        (lambda: normwise.LSTM(4, 6, variant="dreamer"), ValueError, r"exists for gru, not for lstm"),
        (lambda: normwise.LSTM(4, 6, norm="batch", variant="haste"), ValueError, r"layer normalization, but norm='b"),
        (lambda: normwise.LSTM(4, 6, variant="laurent2015"), ValueError, r"pass norm='batch'"),
        (lambda: normwise.LSTM(4, 6, norm="group"), ValueError, r"norm='group' is not known"),
        (lambda: normwise.LSTM(4, 6, variant=3), TypeError, r"name of a preset, a normwise.Recurrence or None.*int"),
        (lambda: normwise.GRU(4, 6, proj_size=2), ValueError, r"proj_size argument is only supported for LSTM"),
        (lambda: normwise.LSTM(4, 6, proj_size=6), ValueError, r"proj_size has to be smaller than hidden_size"),
        (lambda: normwise.RNN(4, 6, nonlinearity="gelu"), ValueError, r"Unknown nonlinearity 'gelu'"),
        (lambda: normwise.GRU(4, 6, update_gate="ours"), ValueError, r"update_gate='ours' is not known"),
        (lambda: normwise.GRU(4, 6, eps=0.0), ValueError, r"eps must be positive"),
        (lambda: normwise.GRU(4, 6, zoneout=1.1), ValueError, r"zoneout is a probability"),
        (
            lambda: normwise.GRU(4, 6, norm="batch", num_stat_steps=0),
            ValueError,
            r"num_stat_steps must be a positive integer",
        ),
        (lambda: normwise.GRU(4, 6, norm="batch", momentum=1.5), ValueError, r"momentum must lie in \[0, 1\]"),
        (lambda: normwise.LSTM(4, 6, statistics="sequence"), ValueError, r"only for batch norm on the input term"),
        (lambda: normwise.LSTM(4, 6, norm="batch", statistics="sequence"), ValueError, r"variant='laurent2015'"),
        (lambda: normwise.LSTM(4, 6, bias=False, forget_bias=1.0), ValueError, r"bias=False leaves it out"),
        (lambda: normwise.LSTM(4, 6, dropout=2.0), ValueError, r"dropout should be a number in range \[0, 1\]"),
        (lambda: normwise.LSTM(4, 6, variant=Recurrence("gru")), ValueError, r"describes a gru cell, but.*is lstm"),
        (
            lambda: normwise.LSTM(4, 6, norm="rms", variant=Recurrence("lstm")),
            ValueError,
            r"norm='rms' contradicts the norm='layer' of the given Recurrence",
        ),
        (lambda: normwise.LSTM(4, 6, norm=None, variant=Recurrence("lstm")), ValueError, r"norm=None contradicts"),
        (
            lambda: normwise.RNN(4, 6, nonlinearity="relu", variant=Recurrence("rnn")),
            ValueError,
            r"nonlinearity='relu' contradicts the nonlinearity='tanh'",
        ),
        (lambda: normwise.LSTM.from_torch(nn.GRU(4, 6)), TypeError, r"expects a torch.nn.LSTM, but got GRU"),
        (
            lambda: normwise.LSTM.from_torch(normwise.LSTM(4, 6)),
            TypeError,
            r"expects a torch.nn.LSTM, but got normwise.LSTM: copy it by copy.deepcopy\(layer\)$",
        ),
        (lambda: normwise.LSTM.from_torch(nn.LSTM(4, 6), forget_bias=1.0), TypeError, r"keeps the layer's b"),
        (
            lambda: normwise.LSTMCell(4, 6, variant=replace(PRESETS["lstm"]["laurent2015"], statistics="sequence")),
            ValueError,
            r"LSTMCell sees one step.*use 'per_step'",
        ),
    ],
)
def test_bad_construction_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_description_of_ones_own_brings_its_norm():
    config = Recurrence("rnn", "rms", "sum", hidden_bias=False, nonlinearity="relu")
    layer = normwise.RNN(4, 6, variant=config)
    assert layer.recurrence == config
    assert layer.nonlinearity == "relu"
    assert normwise.RNN(4, 6, variant=config, norm="rms", eps=0.5).recurrence == replace(config, eps=0.5)


@pytest.mark.parametrize(
    ("make", "call", "error", "message"),
    [
        (lambda: normwise.GRU(4, 6, bidirectional=True), (X[0],), ValueError, r"bidirectional=False"),
        (lambda: normwise.GRU(4, 6), (X,), ValueError, r"expects input of shape \(batch, 4\) or \(4,\), but got"),
        (lambda: normwise.GRU(4, 6, norm="batch"), (X[0],), ValueError, r"need to know which step.*pass step=0, 1, 2"),
        (lambda: normwise.GRU(4, 6), (X[0, :, :3],), RuntimeError, r"Expected 4, got 3"),
        (lambda: normwise.GRU(4, 6), (X[0], torch.zeros(B, 6)), RuntimeError, r"hx should also be 3-D"),
        (
            lambda: normwise.GRU(4, 6, norm="batch", variant="laurent2015", statistics="sequence"),
            (X[0],),
            ValueError,
            r"use eval mode, or statistics='per_step'",
        ),
    ],
)
def test_a_bad_call_of_step_is_refused(make, call, error, message):
    with pytest.raises(error, match=message):
        make().step(*call)


def test_steps_with_a_wrong_index_or_reset():
    layer = normwise.GRU(4, 6, norm="batch")
    with pytest.raises(ValueError, match="step counts steps from 0, but got -1"):
        layer.step(X[0], step=-1)
    with pytest.raises(ValueError, match=r"reset must be of shape \(3,\), one for each sample"):
        layer.step(X[0], step=0, reset=torch.zeros(2).bool())


@pytest.mark.parametrize(
    ("make", "call", "error", "message"),
    [
        (lambda: normwise.GRUCell(4, 6), (X,), ValueError, r"GRUCell: Expected input to be 1D or 2D, got 3D instead"),
        (lambda: normwise.GRUCell(4, 6), (X[0, :, :3],), ValueError, r"inconsistent input_size: got 3 expected 4"),
        (
            lambda: normwise.LSTMCell(4, 6),
            (X[0], (torch.zeros(B, 6), torch.zeros(B, 5))),
            ValueError,
            r"LSTMCell: Expected hidden\[1\] to be of shape \(3, 6\), got \(3, 5\)",
        ),
        (lambda: normwise.LSTMCell(4, 6), (X[0], torch.zeros(B, 6)), TypeError, r"pair \(h, c\), but got Tensor"),
        (lambda: normwise.RNNCell(4, 6, norm="batch"), (X[0],), ValueError, r"pass step=0, 1, 2"),
        (lambda: normwise.RNNCell(4, 6, norm="batch"), (X[0, :1],), ValueError, r"need to know which step"),
    ],
)
def test_a_bad_call_of_a_cell_is_refused(make, call, error, message):
    with pytest.raises(error, match=message):
        make()(*call)


def test_a_refused_call_moves_no_running_statistics():
    layer = normwise.LSTM(4, 6, norm="batch")
    with pytest.raises(ValueError, match="lengths must lie in"):
        layer(torch.randn(T, B, INPUT), lengths=[1, 2, 9])
    assert (layer.running_mean_ih_l0 == 0).all()


@pytest.mark.parametrize("norm", ["layer", "rms", "batch"])
@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
def test_the_state_of_torchs_layer_says_how_it_is_taken_over(name, norm):
    theirs, layer = getattr(nn, name)(4, 6), getattr(normwise, name)(4, 6, norm=norm)
    of_layer = "" if norm == "layer" else f", norm='{norm}'"
    said = rf"Missing key\(s\).*The state_dict has no gains.*normwise.{name}.from_torch\(layer{of_layer}\), or.*"
    with pytest.raises(RuntimeError, match=rf"(?s){said}normwise.convert\(model, recurrent='{norm}'\)$"):
        layer.load_state_dict(theirs.state_dict())
    missing = layer.load_state_dict(theirs.state_dict(), strict=False).missing_keys
    assert missing
    assert not [key for key in missing if key in theirs.state_dict()]
    layer.load_state_dict(layer.state_dict())
    with pytest.raises(RuntimeError, match=r"size mismatch[^\t]*$"):
        layer.load_state_dict(getattr(normwise, name)(4, 5, norm=norm).state_dict() | {"weight_ih_l0": torch.ones(1)})
    assert normwise.convert(nn.Sequential(theirs), recurrent=norm).model[0].recurrence.norm == norm
    assert getattr(normwise, name).from_torch(theirs, norm=norm).recurrence.norm == norm


def test_what_is_between_layers_is_missing_too():
    layer = normwise.LSTM(4, 6, 2, norm=None, between="rms")
    with pytest.raises(RuntimeError, match=r"normwise.LSTM.from_torch\(layer, norm=None\)$"):
        layer.load_state_dict(nn.LSTM(4, 6, 2).state_dict())
