"""The path that users get, against the reference: outputs, states, batch statistics and all gradients."""

from __future__ import annotations

import pytest
import torch

import normwise
from normwise.backends.recurrence import Recurrence, Weights
from normwise.backends.reference import recurrence as reference
from normwise.backends.reference.moments import Moments
from normwise.ops.rnn import running_stats as recurrent_running
from normwise.ops.rnn.presets import PRESETS, preset
from support.backends import using
from support.recurrences import random_weights
from support.recurrent_calls import recurrence
from support.tolerances import assert_close

T, B, INPUT, HIDDEN = 6, 5, 3, 4
CASES = [
    (cell, name, norm)
    for cell, presets in PRESETS.items()
    for name, config in presets.items()
    for norm in (["batch", "given"] if config.norm == "batch" else ["layer", "rms"])
]
CASES += [(cell, None, None) for cell in PRESETS]


def sample(cell, name, norm, dtype=torch.float64, **changes):
    config = preset(cell, "batch" if norm == "given" else norm, name)
    config = Recurrence(**{**vars(config), **changes})
    weights = {k: v.to(dtype) for k, v in random_weights(config.shapes(INPUT, HIDDEN)).items()}
    x = torch.randn(T, B, INPUT).to(dtype)
    states = [torch.randn(B, HIDDEN).to(dtype) for _ in range(2 if cell == "lstm" else 1)]
    leaves = [t.requires_grad_() for t in (x, *states, *weights.values())]
    running = None
    if norm == "given":
        running = {
            s: (torch.randn(3, n).to(dtype), torch.rand(3, n).to(dtype) + 0.5) for s, n in config.sites(HIDDEN).items()
        }
    return config, Weights(**weights), x, states[0], states[1] if cell == "lstm" else None, running, leaves


def tensors(result):
    return [t for t in result[:3] if t is not None]


def gradients(outputs, leaves, upstream):
    return torch.autograd.grad(outputs, leaves, upstream, allow_unused=True)


@pytest.mark.parametrize("backwards", [False, True], ids=["forwards", "backwards"])
@pytest.mark.parametrize("ragged", [False, True], ids=["full", "ragged"])
@pytest.mark.parametrize(("cell", "name", "norm"), CASES)
def test_the_fast_loop_is_the_reference(cell, name, norm, ragged, backwards):
    config, w, x, h0, c0, running, leaves = sample(cell, name, norm)
    lengths = torch.tensor([5, 2, 4, 3, 5]) if ragged else None  # nobody runs at the last step
    options = {
        "lengths": lengths,
        "reset": torch.rand(T, B) < 0.3,
        "reverse": backwards,
        "running": running,
        "start_step": 1,
    }
    fast = recurrence(x, h0, c0, w, config, **options)
    true = reference.recurrence(x, h0, c0, w, config, **options)
    upstream = [torch.randn_like(t) for t in tensors(true)]
    for a, e in zip(tensors(fast), tensors(true), strict=True):
        assert_close(a, e, kind="composed")
    for a, e in zip(
        gradients(tensors(fast), leaves, upstream), gradients(tensors(true), leaves, upstream), strict=True
    ):
        assert (a is None) == (e is None)
        if a is not None:
            assert_close(a, e, kind="composed", count=T * B, scale=max(1.0, e.abs().max().item()))
    assert set(fast.statistics) == set(true.statistics)
    for site, moments in true.statistics.items():
        steps = len(fast.statistics[site].count)
        assert not moments.count[steps:].any()  # at which nobody runs
        for a, e in zip(fast.statistics[site], moments, strict=True):
            assert_close(a, e[:steps], kind="composed", scale=1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("cell", "name", "norm"),
    [("lstm", "ba2016", "layer"), ("gru", "dreamer", "rms"), ("rnn", "cooijmans2016", "batch")],
)
def test_low_precision_stays_near_the_float64_truth(cell, name, norm, dtype):
    config, w, x, h0, c0, _, leaves = sample(cell, name, norm, dtype)
    fast = recurrence(x, h0, c0, w, config)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    names = [n for n, v in w._asdict().items() if v is not None]
    w64 = Weights(**dict(zip(names, wide[-len(names) :], strict=True)))
    true = reference.recurrence(wide[0], wide[1], wide[2] if cell == "lstm" else None, w64, config)
    for a, e in zip(tensors(fast), tensors(true), strict=True):
        assert a.dtype == dtype
        assert_close(a, e, kind="composed", count=T * HIDDEN, scale=2.0)
    upstream = [torch.randn_like(t) for t in tensors(fast)]
    for a, e in zip(
        gradients(tensors(fast), leaves, upstream),
        gradients(tensors(true), wide, [u.double() for u in upstream]),
        strict=True,
    ):
        assert_close(a, e, kind="composed", count=T * B * HIDDEN, scale=max(1.0, 2 * e.abs().max().item()))


@pytest.mark.parametrize(
    ("cell", "name"), [("lstm", "per_gate"), ("gru", "ba2016"), ("gru", "dreamer"), ("rnn", "ba2016")]
)
def test_zoneout_and_the_gru_options(cell, name):
    changes = {"zoneout": 0.3}
    if name == "ba2016" and cell == "gru":
        changes |= {"update_gate": "paper", "update_offset": -0.5}
    config, w, x, h0, c0, _, _ = sample(cell, name, "layer", **changes)
    for zoneout_mask in (None, torch.rand(T, B, HIDDEN) < 0.3):
        fast = recurrence(x, h0, c0, w, config, zoneout_mask=zoneout_mask)
        true = reference.recurrence(x, h0, c0, w, config, zoneout_mask=zoneout_mask)
        assert_close(fast.output, true.output, kind="composed")


def test_a_relu_that_diverges_past_the_end_of_a_sequence_poisons_no_gradient():
    config = Recurrence("rnn", None, nonlinearity="relu")
    w = Weights(torch.ones(2, 1).double(), (torch.eye(2).double() * 1e60).requires_grad_())
    x, h0 = torch.ones(8, 2, 1).double(), torch.zeros(2, 2).double()
    result = recurrence(x * 1e-3, h0, None, w, config, lengths=torch.tensor([2, 1]))
    (grad,) = torch.autograd.grad(result.output.sum(), [w.weight_hh])
    assert torch.isfinite(grad).all()


def test_a_forced_reference_runs_the_reference():
    config, w, x, h0, c0, _, _ = sample("lstm", "ba2016", "layer")
    with using("reference"):
        result = recurrence(x, h0, c0, w, config)
    assert torch.equal(result.output, reference.recurrence(x, h0, c0, w, config).output)


def test_a_backend_that_cannot_run_it_says_so():
    config, w, x, h0, c0, _, _ = sample("lstm", "ba2016", "layer")
    with (
        normwise.backend("cpu"),
        pytest.raises(normwise.BackendError, match=r"cannot run recurrence: .*not torch\.float64"),
    ):
        recurrence(x, h0, c0, w, config)


@pytest.mark.parametrize("start_step", [0, 1, 5])
@pytest.mark.parametrize("rows", [1, 3, 9])
def test_running_statistics_move_step_by_step(rows, start_step):
    steps, features, momentum = 5, 2, 0.3
    mean, var = torch.randn(steps, features), torch.rand(steps, features)
    count = torch.tensor([[4.0], [3.0], [2.0], [1.0], [0.0]])
    table_mean, table_var = torch.randn(rows, features), torch.rand(rows, features)
    expected_mean, expected_var = table_mean.clone(), table_var.clone()
    for t in range(steps):
        n = count[t].item()
        if n < 2:  # one sample has no deviation
            continue
        row = min(start_step + t, rows - 1)
        expected_mean[row] = (1 - momentum) * expected_mean[row] + momentum * mean[t]
        expected_var[row] = (1 - momentum) * expected_var[row] + momentum * var[t] * n / (n - 1)
    recurrent_running.update_tables(table_mean, table_var, Moments(mean, var, count), momentum, start_step)
    assert_close(table_mean, expected_mean, kind="composed")
    assert_close(table_var, expected_var, kind="composed")
