"""The reference loop on sequences of different lengths, backwards, across resets, with zoneout; and its derivatives."""

from __future__ import annotations

import pytest
import torch

from normwise.backends.recurrence import Recurrence, Weights
from normwise.backends.reference.recurrence import recurrence
from normwise.backends.reference.sequences import reverse, reverse_reset, valid_steps
from normwise.ops.rnn.presets import PRESETS
from support.recurrences import random_weights
from support.tolerances import assert_close

T, B, INPUT, HIDDEN = 6, 4, 3, 4
ALL = [(cell, name) for cell, presets in PRESETS.items() for name in presets]
PER_SAMPLE = [(cell, name) for cell, name in ALL if PRESETS[cell][name].norm != "batch"]
LENGTHS = [6, 0, 3, 5]


def sample(cell, name, batch=B, steps=T):
    config = PRESETS[cell][name]
    w = Weights(**random_weights(config.shapes(INPUT, HIDDEN)))
    x = torch.randn(steps, batch, INPUT, dtype=torch.float64)
    h0 = torch.randn(batch, HIDDEN, dtype=torch.float64)
    c0 = torch.randn(batch, HIDDEN, dtype=torch.float64) if cell == "lstm" else None
    given = None
    if config.norm == "batch":  # as in eval, where samples do not depend on each other
        given = {
            site: (torch.randn(T, n, dtype=torch.float64), torch.rand(T, n, dtype=torch.float64) + 0.5)
            for site, n in config.sites(HIDDEN).items()
        }
    return config, w, x, h0, c0, given


def one(config, w, x, h0, c0, b, steps, **options):
    return recurrence(x[steps, b : b + 1], h0[b : b + 1], None if c0 is None else c0[b : b + 1], w, config, **options)


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize(("cell", "name"), ALL)
def test_padded_is_the_same_as_one_at_a_time(cell, name, backwards):
    config, w, x, h0, c0, running = sample(cell, name)
    padded = x.clone()
    for b, n in enumerate(LENGTHS):
        padded[n:, b] = float("nan")
    result = recurrence(padded, h0, c0, w, config, lengths=torch.tensor(LENGTHS), reverse=backwards, running=running)
    for b, n in enumerate(LENGTHS):
        assert (result.output[n:, b] == 0).all()
        if n == 0:
            assert torch.equal(result.h[b], h0[b])
            assert c0 is None or torch.equal(result.c[b], c0[b])
            continue
        alone = one(config, w, x, h0, c0, b, slice(0, n), reverse=backwards, running=running)
        assert_close(result.output[:n, b], alone.output[:, 0], kind="composed")
        assert_close(result.h[b], alone.h[0], kind="composed")
        if c0 is not None:
            assert_close(result.c[b], alone.c[0], kind="composed")


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize(("cell", "name"), PER_SAMPLE)
def test_a_reset_cuts_the_sequence_at_the_same_place_in_both_directions(cell, name, backwards):
    config, w, x, h0, c0, _ = sample(cell, name)
    lengths = [6, 0, 3, 5]
    cuts = [2, 2, 1, 4]  # between steps cut-1 and cut
    reset = torch.zeros(T, B, dtype=torch.bool)
    for b, cut in enumerate(cuts):
        reset[cut, b] = True
    reset[5, 2] = True  # after the end of its sequence: no effect
    result = recurrence(x, h0, c0, w, config, lengths=torch.tensor(lengths), reset=reset, reverse=backwards)
    zeros = (torch.zeros_like(h0), None if c0 is None else torch.zeros_like(c0))
    assert torch.equal(result.h[1], h0[1])  # nor has one before a sequence that never starts
    for b, (n, cut) in enumerate(zip(lengths, cuts, strict=True)):
        if n == 0:
            continue
        given, fresh = (h0, c0), zeros
        before, after = (fresh, given) if backwards else (given, fresh)
        left = one(config, w, x, *before, b, slice(0, cut), reverse=backwards)
        right = one(config, w, x, *after, b, slice(cut, n), reverse=backwards)
        assert_close(result.output[:n, b], torch.cat([left.output, right.output])[:, 0], kind="composed")
        final = left if backwards else right
        assert_close(result.h[b], final.h[0], kind="composed")
        if c0 is not None:
            assert_close(result.c[b], final.c[0], kind="composed")


def test_a_reset_before_the_first_step_clears_the_given_state():
    config, w, x, h0, c0, _ = sample("lstm", "ba2016")
    reset = torch.zeros(T, B, dtype=torch.bool)
    reset[0, 1] = True
    result = recurrence(x, h0, c0, w, config, reset=reset)
    h0, c0 = h0.clone(), c0.clone()
    h0[1], c0[1] = 0, 0
    assert_close(result.output, recurrence(x, h0, c0, w, config).output)


def test_zoneout_keeps_units_in_training_and_takes_the_expectation_otherwise():
    config = Recurrence(**{**vars(PRESETS["gru"]["haste"]), "zoneout": 0.25})
    _, w, x, h0, _, _ = sample("gru", "haste", steps=2)
    zoneout_mask = torch.rand(2, B, HIDDEN) < 0.25
    without = Recurrence("gru")
    h1 = torch.where(zoneout_mask[0], h0, recurrence(x[:1], h0, None, w, without).h)
    h2 = torch.where(zoneout_mask[1], h1, recurrence(x[1:], h1, None, w, without).h)
    assert_close(
        recurrence(x, h0, None, w, config, zoneout_mask=zoneout_mask).output, torch.stack([h1, h2]), kind="composed"
    )
    expected = 0.25 * h0 + 0.75 * recurrence(x[:1], h0, None, w, without).h
    assert_close(recurrence(x[:1], h0, None, w, config).h, expected, kind="composed")


def test_backwards_zoneout_masks_stay_with_their_steps():
    config = Recurrence("rnn", norm_placement="sum", hidden_bias=False, zoneout=0.5)
    _, w, x, h0, _, _ = sample("rnn", "ba2016")
    zoneout_mask = torch.rand(T, B, HIDDEN) < 0.5
    lengths = torch.tensor([6, 2, 3, 5])
    backwards = recurrence(x, h0, None, w, config, lengths=lengths, zoneout_mask=zoneout_mask, reverse=True)
    forwards = recurrence(
        reverse(x, lengths), h0, None, w, config, lengths=lengths, zoneout_mask=reverse(zoneout_mask, lengths)
    )
    assert_close(backwards.output, reverse(forwards.output, lengths))
    assert_close(backwards.h, forwards.h)


def test_poisoned_padding_reaches_no_gradient():
    config, w, x, h0, c0, _ = sample("lstm", "cooijmans2016")
    lengths = torch.tensor([6, 2, 3, 5])
    valid = valid_steps(T, lengths)
    x[~valid] = float("nan")
    leaves = [x, h0, c0, *(v for v in w if v is not None)]
    result = recurrence(*(leaf.requires_grad_() for leaf in (x, h0, c0)), w, config, lengths=lengths)
    for leaf in leaves[3:]:
        leaf.requires_grad_()
    result = recurrence(x, h0, c0, w, config, lengths=lengths)
    outputs = (result.output, result.h, result.c)
    grads = torch.autograd.grad(outputs, leaves, [torch.randn_like(o) for o in outputs], allow_unused=True)
    assert all(torch.isfinite(g).all() for g in grads if g is not None)
    assert (grads[0][~valid] == 0).all()


def test_reverse_is_its_own_inverse_and_leaves_padding():
    x = torch.arange(12.0).view(4, 3)
    lengths = torch.tensor([4, 0, 3])
    turned = reverse(x, lengths)
    assert turned.tolist() == [[9, 1, 8], [6, 4, 5], [3, 7, 2], [0, 10, 11]]
    assert torch.equal(reverse(turned, lengths), x)
    assert torch.equal(reverse(x, None), x.flip(0))


def test_a_boundary_is_crossed_backwards_one_step_later():
    reset = torch.tensor([[1, 0, 0, 1], [0, 0, 1, 0], [0, 0, 0, 1]]).T.bool()  # (4, 3)
    assert reverse_reset(reset, None).T.int().tolist() == [[0, 1, 0, 0], [0, 0, 1, 0], [0, 1, 0, 0]]
    lengths = torch.tensor([2, 4, 3])
    assert reverse_reset(reset, lengths).T.int().tolist() == [[0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize(("cell", "name"), ALL)
def test_gradcheck(cell, name):
    torch.manual_seed(0)
    config = PRESETS[cell][name]
    names, values = zip(*random_weights(config.shapes(2, 3)).items(), strict=True)
    x = torch.randn(3, 3, 2, dtype=torch.float64)
    states = [torch.randn(3, 3, dtype=torch.float64) for _ in range(2 if cell == "lstm" else 1)]
    lengths = torch.tensor([3, 2, 3])
    reset = torch.tensor([[0, 0, 0], [0, 1, 0], [0, 0, 0]]).bool()

    def call(x, *rest):
        states, weights = rest[: -len(names)], rest[-len(names) :]
        c0 = states[1] if cell == "lstm" else None
        w = Weights(**dict(zip(names, weights, strict=True)))
        result = recurrence(x, states[0], c0, w, config, lengths=lengths, reset=reset, reverse=True)
        return tuple(o for o in result[:3] if o is not None)

    inputs = [t.requires_grad_() for t in (x, *states, *values)]
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_precision_is_computed_wide_and_rounded_once(dtype):
    config, w, x, h0, c0, _ = sample("lstm", "ba2016")
    rounded = [t.to(dtype) for t in (x, h0, c0)]
    w = Weights(*(None if v is None else v.to(dtype) for v in w))
    wide = Weights(*(None if v is None else v.double() for v in w))
    result = recurrence(*rounded, w, config)
    truth = recurrence(*(t.double() for t in rounded), wide, config)
    assert result.output.dtype == result.c.dtype == dtype
    kind = "forward" if dtype == torch.bfloat16 else "composed"
    assert_close(result.output, truth.output, kind=kind, count=T)
    assert_close(result.c, truth.c, kind=kind, count=T)
