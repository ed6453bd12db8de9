"""Padded is unpadded is one at a time: outputs, final states and every gradient, for every preset and norm."""

from __future__ import annotations

import pytest
import torch

from normwise.ops.rnn.presets import PRESETS
from support.recurrent_cases import LAYERS, away_from_start
from support.tolerances import assert_close

T, INPUT, HIDDEN = 6, 3, 4
LENGTHS = [3, 6, 0, 5, 1]
B = len(LENGTHS)
CASES = [
    (cell, name, norm)
    for cell, presets in PRESETS.items()
    for name, config in presets.items()
    for norm in (["batch"] if config.norm == "batch" else ["layer", "rms"])
] + [(cell, None, None) for cell in PRESETS]


def layer(cell, name, norm, **options):
    made = LAYERS[cell](INPUT, HIDDEN, 2, bidirectional=True, dtype=torch.float64, norm=norm, variant=name, **options)
    return away_from_start(made).eval()  # samples do not depend on each other, also with batch norm


def states_of(cell, batch):
    return tuple(torch.randn(4, batch, HIDDEN, dtype=torch.float64) for _ in range(2 if cell == "lstm" else 1))


def as_hx(states):
    return states if len(states) == 2 else states[0]


def flat(hx):
    return list(hx) if isinstance(hx, tuple) else [hx]


@pytest.mark.parametrize(("cell", "name", "norm"), CASES)
def test_padded_is_one_at_a_time(cell, name, norm):
    net = layer(cell, name, norm)
    clean = torch.randn(T, B, INPUT, dtype=torch.float64)
    states = states_of(cell, B)
    upstream = torch.randn(T, B, 2 * HIDDEN, dtype=torch.float64)
    upstream_states = [torch.randn_like(s) for s in states]

    alone = {key: torch.zeros_like(p) for key, p in net.named_parameters()}
    expected_out, expected_states, expected_dx, expected_ds = [], [], [], []
    for b, n in enumerate(LENGTHS):
        x = clean[:n, b : b + 1].clone().requires_grad_()
        given = [s[:, b : b + 1].clone().requires_grad_() for s in states]
        if n == 0:
            expected_out.append(torch.zeros(0, 1, 2 * HIDDEN))
            expected_states.append(given)
            expected_ds.append([u[:, b : b + 1] for u in upstream_states])
            expected_dx.append(torch.zeros(0, 1, INPUT))
            continue
        output, hx = net(x, as_hx(given))
        outs = [output, *flat(hx)]
        ups = [upstream[:n, b : b + 1], *(u[:, b : b + 1] for u in upstream_states)]
        grads = torch.autograd.grad(outs, [x, *given, *net.parameters()], ups)
        expected_out.append(output)
        expected_states.append(flat(hx))
        expected_dx.append(grads[0])
        expected_ds.append(grads[1 : 1 + len(given)])
        for key, grad in zip(alone, grads[1 + len(given) :], strict=True):
            alone[key] += grad

    padded = clean.clone()
    for b, n in enumerate(LENGTHS):
        padded[n:, b] = float("nan")
    padded.requires_grad_()
    given = [s.clone().requires_grad_() for s in states]
    output, hx = net(padded, as_hx(given), lengths=torch.tensor(LENGTHS))
    grads = torch.autograd.grad([output, *flat(hx)], [padded, *given, *net.parameters()], [upstream, *upstream_states])
    for b, n in enumerate(LENGTHS):
        assert_close(output[:n, b], expected_out[b][:, 0], kind="composed", scale=1.0)
        assert (output[n:, b] == 0).all()
        assert_close(grads[0][:n, b], expected_dx[b][:, 0], kind="composed", scale=10.0)
        assert (grads[0][n:, b] == 0).all()
        for k in range(len(states)):
            assert_close(flat(hx)[k][:, b], expected_states[b][k][:, 0], kind="composed", scale=1.0)
            assert_close(grads[1 + k][:, b], expected_ds[b][k][:, 0], kind="composed", scale=10.0)
    for key, grad in zip(alone, grads[1 + len(states) :], strict=True):
        assert_close(grad, alone[key], kind="composed", scale=max(1.0, alone[key].abs().max().item()), name=key)


@pytest.mark.parametrize(("cell", "name", "norm"), CASES)
def test_more_padding_changes_nothing_in_training_either(cell, name, norm):
    """Batch norm included: finished sequences enter no statistics and move no running average."""
    net = layer(cell, name, norm).train()
    lengths = torch.tensor([3, 5, 0, 5, 2])
    x = torch.randn(5, B, INPUT, dtype=torch.float64)
    before = {key: value.clone() for key, value in net.named_buffers()}
    output, hx = net(x, lengths=lengths)
    after = {key: value.clone() for key, value in net.named_buffers()}
    with torch.no_grad():
        for key, value in net.named_buffers():
            value.copy_(before[key])
    longer = torch.cat([x, torch.full((3, B, INPUT), float("nan"), dtype=torch.float64)])
    again, hx_again = net(longer, lengths=lengths)
    assert_close(again[:5], output, kind="composed", scale=1.0)
    assert (again[5:] == 0).all()
    for a, e in zip(flat(hx_again), flat(hx), strict=True):
        assert_close(a, e, kind="composed", scale=1.0)
    for key, value in net.named_buffers():
        assert_close(value, after[key], kind="composed", scale=1.0, name=key)
        assert not torch.equal(value, before[key])


@pytest.mark.parametrize(("cell", "name", "norm"), CASES)
def test_packed_is_padded(cell, name, norm):
    net = layer(cell, name, norm)
    lengths = [n for n in LENGTHS if n]
    sequences = [torch.randn(n, INPUT, dtype=torch.float64) for n in lengths]
    states = states_of(cell, len(lengths))
    packed = torch.nn.utils.rnn.pack_sequence(sequences, enforce_sorted=False)
    output, hx = net(packed, as_hx(states))
    padded, padded_hx = net(torch.nn.utils.rnn.pad_sequence(sequences), as_hx(states), lengths=torch.tensor(lengths))
    unpacked, found = torch.nn.utils.rnn.pad_packed_sequence(output)
    assert found.tolist() == lengths
    assert torch.equal(output.sorted_indices, packed.sorted_indices)
    assert_close(unpacked, padded, kind="composed", scale=1.0)
    for a, e in zip(flat(hx), flat(padded_hx), strict=True):
        assert_close(a, e, kind="composed", scale=1.0)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("norm", ["layer", None])
def test_packed_with_resets_is_padded_with_resets(norm, batch_first):
    net = layer("lstm", None, norm, batch_first=batch_first)
    lengths = [3, 6, 5]
    sequences = [torch.randn(n, INPUT, dtype=torch.float64) for n in lengths]
    reset = torch.rand(6, 3) < 0.3
    reset = reset.T if batch_first else reset
    packed = torch.nn.utils.rnn.pack_sequence(sequences, enforce_sorted=False)
    output, hx = net(packed, reset=reset)
    unpacked, _ = torch.nn.utils.rnn.pad_packed_sequence(output, batch_first=batch_first)
    padded = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=batch_first)
    expected, expected_hx = net(padded, reset=reset, lengths=lengths)
    assert_close(unpacked, expected, kind="composed", scale=1.0)
    for a, e in zip(hx, expected_hx, strict=True):
        assert_close(a, e, kind="composed", scale=1.0)
