"""norm=None is torch.nn's layer: results, gradients, random numbers, state_dict, for padded and packed input."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence, pad_sequence

import normwise
from support.backends import using
from support.tolerances import assert_close

T, B, INPUT, HIDDEN = 5, 3, 4, 6
# torch says so itself, once in a process.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")

PAIRS = [(normwise.RNN, nn.RNN), (normwise.GRU, nn.GRU), (normwise.LSTM, nn.LSTM)]
CELLS = [(normwise.RNNCell, nn.RNNCell), (normwise.GRUCell, nn.GRUCell), (normwise.LSTMCell, nn.LSTMCell)]
OPTIONS = [
    {},
    {"num_layers": 2, "bidirectional": True},
    {"num_layers": 3, "dropout": 0.4, "batch_first": True},
    {"bias": False, "dtype": torch.float64},
    {"proj_size": 3, "num_layers": 2, "bidirectional": True},
    {"nonlinearity": "relu"},
]


def fits(ours, options):
    return not ("proj_size" in options and ours is not normwise.LSTM) and not (
        "nonlinearity" in options and ours is not normwise.RNN
    )


ALL = [(o, t, x) for (o, t), x in itertools.product(PAIRS, OPTIONS) if fits(o, x)]


def twins(ours, theirs, options):
    torch.manual_seed(0)
    a = ours(INPUT, HIDDEN, norm=None, **options)
    torch.manual_seed(0)
    return a, theirs(INPUT, HIDDEN, **options)


def flat(result):
    """All tensors of a (nested) result."""
    if isinstance(result, PackedSequence):
        return [result.data, result.batch_sizes, result.sorted_indices, result.unsorted_indices]
    return [result] if isinstance(result, torch.Tensor) else [t for part in result for t in flat(part)]


def hx_for(layer, batch, dtype):
    count = layer.num_layers * (1 + layer.bidirectional)
    h = torch.randn(count, batch, getattr(layer, "proj_size", 0) or HIDDEN, dtype=dtype)
    return (h, torch.randn(count, batch, HIDDEN, dtype=dtype)) if layer.mode == "LSTM" else h


def same(ours, theirs, call):
    """Outputs and gradients, drawn from the same random numbers: by torch's own kernels equal to the last bit, by the
    backend that is chosen, which may be another, up to rounding."""
    expected = results_of(theirs, call)
    with using("aten"):
        exact = results_of(ours, call)
    for a, b in zip(exact, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    for a, b in zip(results_of(ours, call), expected, strict=True):
        if b.is_floating_point():
            assert_close(a, b, kind="composed", scale=max(1.0, b.abs().max().item()))
        else:
            assert torch.equal(a, b)


def results_of(layer, call):
    """The tensors that `call(layer)` returns, and the gradients of the layer's parameters by random upstream ones."""
    torch.manual_seed(1)
    outputs = [t for t in flat(call(layer)) if t is not None]
    with_grad = [t for t in outputs if t.requires_grad]
    grads = torch.autograd.grad(with_grad, list(layer.parameters()), [torch.randn_like(t) for t in with_grad])
    return [*outputs, *grads]


@pytest.mark.parametrize(("ours", "theirs", "options"), ALL)
def test_padded_input_with_and_without_states(ours, theirs, options):
    a, b = twins(ours, theirs, options)
    dtype = options.get("dtype", torch.float32)
    x = torch.randn((B, T, INPUT) if a.batch_first else (T, B, INPUT), dtype=dtype)
    hx = hx_for(b, B, dtype)
    same(a, b, lambda layer: layer(x))
    same(a, b, lambda layer: layer(x, hx))
    same(a.eval(), b.eval(), lambda layer: layer(x, hx))


@pytest.mark.parametrize("enforce_sorted", [True, False])
@pytest.mark.parametrize(("ours", "theirs", "options"), ALL)
def test_packed_input_gives_what_torch_gives(ours, theirs, options, enforce_sorted):
    a, b = twins(ours, theirs, options)
    dtype = options.get("dtype", torch.float32)
    lengths = [5, 3, 3] if enforce_sorted else [3, 5, 1]
    packed = pack_sequence([torch.randn(n, INPUT, dtype=dtype) for n in lengths], enforce_sorted=enforce_sorted)
    hx = hx_for(b, B, dtype)
    same(a, b, lambda layer: layer(packed))
    same(a, b, lambda layer: layer(packed, hx))


@pytest.mark.parametrize(("ours", "theirs", "options"), ALL)
def test_unbatched_input(ours, theirs, options):
    a, b = twins(ours, theirs, options)
    dtype = options.get("dtype", torch.float32)
    x = torch.randn(T, INPUT, dtype=dtype)
    hx = hx_for(b, 1, dtype)
    hx = tuple(s[:, 0] for s in hx) if isinstance(hx, tuple) else hx[:, 0]
    same(a, b, lambda layer: layer(x))
    same(a, b, lambda layer: layer(x, hx))


@pytest.mark.parametrize(("ours", "theirs", "options"), ALL)
def test_lengths_give_what_packing_gives(ours, theirs, options):
    a, b = twins(ours, theirs, options)
    a.eval(), b.eval()
    dtype = options.get("dtype", torch.float32)
    lengths = [3, 5, 1]
    sequences = [torch.randn(n, INPUT, dtype=dtype) for n in lengths]
    hx = hx_for(b, B, dtype)
    padded = pad_sequence(sequences, batch_first=a.batch_first, padding_value=float("nan"))

    def call(layer):
        if layer is a:
            return layer(padded, hx, lengths=lengths)
        output, states = layer(pack_sequence(sequences, enforce_sorted=False), hx)
        return pad_packed_sequence(output, batch_first=a.batch_first)[0], states

    same(a, b, call)


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_an_empty_sequence_keeps_its_state(ours, theirs):
    a, _ = twins(ours, theirs, {"num_layers": 2})
    x = torch.full((T, B, INPUT), float("nan"))
    x[:, 0] = 1.0
    hx = hx_for(a, B, torch.float32)
    output, states = a(x, hx, lengths=torch.tensor([T, 0, 0]))
    assert (output[:, 1:] == 0).all()
    for before, after in zip(flat(hx), flat(states), strict=True):
        assert torch.equal(before[:, 1:], after[:, 1:])


@pytest.mark.parametrize(("ours", "theirs", "options"), ALL)
def test_state_dicts_load_both_ways(ours, theirs, options):
    a, b = ours(INPUT, HIDDEN, norm=None, **options), theirs(INPUT, HIDDEN, **options)
    assert list(a.state_dict()) == list(b.state_dict())
    b.load_state_dict(a.state_dict())
    x = torch.randn(T, B, INPUT, dtype=options.get("dtype", torch.float32))
    x = x.transpose(0, 1) if a.batch_first else x
    same(a, b, lambda layer: layer(x))
    c = ours(INPUT, HIDDEN, norm=None, **options)
    c.load_state_dict(b.state_dict())
    same(c, b, lambda layer: layer(x))


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_from_torch_without_a_norm_is_a_copy(ours, theirs):
    theirs = theirs(INPUT, HIDDEN, 2, bidirectional=True).eval()
    copy = ours.from_torch(theirs, norm=None)
    assert not copy.training
    same(copy, theirs, lambda layer: layer(torch.ones(T, B, INPUT)))


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_a_reset_works_without_a_norm_too(ours, theirs):
    a, b = twins(ours, theirs, {})
    x = torch.randn(T, B, INPUT)
    reset = torch.zeros(T, B, dtype=torch.bool)
    reset[2] = True
    output, _ = a(x, reset=reset)
    torch.testing.assert_close(output, torch.cat([b(x[:2])[0], b(x[2:])[0]]))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("ours", "theirs"), CELLS)
def test_cells_are_torch_s(ours, theirs, bias):
    torch.manual_seed(0)
    a = ours(INPUT, HIDDEN, bias, norm=None)
    torch.manual_seed(0)
    b = theirs(INPUT, HIDDEN, bias)
    assert list(a.state_dict()) == list(b.state_dict())
    for shape in ((B,), ()):
        h = torch.randn(*shape, HIDDEN)
        hx = (h, torch.randn(*shape, HIDDEN)) if ours is normwise.LSTMCell else h
        x = torch.randn(*shape, INPUT)
        same(a, b, lambda cell, x=x: cell(x))
        same(a, b, lambda cell, x=x, hx=hx: cell(x, hx))


def test_forget_bias_without_a_norm():
    layer = normwise.LSTM(INPUT, HIDDEN, norm=None, forget_bias=1.5)
    assert (layer.bias_ih_l0[HIDDEN : 2 * HIDDEN] == 1.5).all()
    assert (layer.bias_hh_l0[HIDDEN : 2 * HIDDEN] == 0).all()
    assert layer(torch.randn(T, B, INPUT))[0].shape == (T, B, HIDDEN)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_autocast_does_what_it_does_to_torchs_layer_or_works_where_that_fails(ours, theirs, dtype):
    a, b = twins(ours, theirs, {})
    x = torch.randn(T, B, INPUT)
    exact, _ = a(x)
    with torch.autocast("cpu", dtype):
        output, _ = a(x)
        try:
            expected, _ = b(x)
        except RuntimeError:  # oneDNN has no LSTM in float16
            expected = exact.to(dtype)
    assert output.dtype == expected.dtype
    # States lie below 1, where bfloat16 rounds by up to 0.002, again at each of the few steps.
    torch.testing.assert_close(output.float(), exact, rtol=0, atol=0.02)
    output.float().sum().backward()
