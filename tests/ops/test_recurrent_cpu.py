"""The compiled recurrent kernels as layers use them, against the reference in float64."""

from __future__ import annotations

import statistics
import warnings

import pytest
import torch

import normwise
from normwise.backends.cpu import library
from normwise.backends.cpu import rnn as cpu_rnn
from normwise.backends.recurrence import Recurrence, Weights
from normwise.backends.reference import recurrence as reference
from normwise.ops.rnn.presets import PRESETS, preset
from support import recurrent_calls
from support.backends import ran, using
from support.recurrences import random_weights
from support.recurrent_calls import recurrence
from support.tolerances import assert_close

pytestmark = pytest.mark.skipif(library.missing() is not None, reason=f"no compiled library: {library.missing()}")

T, B, INPUT, HIDDEN = 6, 5, 3, 4
CASES = [
    (cell, name, norm)
    for cell, presets in PRESETS.items()
    for name, config in presets.items()
    for norm in ("layer", "rms")
    if config.norm != "batch"
] + [(cell, None, None) for cell in PRESETS]


def sample(cell, name, norm):
    config = preset(cell, norm, name)
    weights = {key: value.float() for key, value in random_weights(config.shapes(INPUT, HIDDEN)).items()}
    x = torch.randn(T, B, INPUT)
    states = [torch.randn(B, HIDDEN) for _ in range(2 if cell == "lstm" else 1)]
    return config, Weights(**weights), x, states[0], states[1] if cell == "lstm" else None


def wide(t):
    return None if t is None else t.detach().double().requires_grad_()


def present(tensors):
    return [t for t in tensors if t is not None]


@pytest.mark.parametrize("backwards", [False, True], ids=["forwards", "backwards"])
@pytest.mark.parametrize("lengths", [None, [6, 2, 4, 3, 5], [5, 0, 4, 0, 5]], ids=["full", "ragged", "some empty"])
@pytest.mark.parametrize(("cell", "name", "norm"), CASES)
def test_the_kernels_are_the_reference(cell, name, norm, lengths, backwards):
    config, w, x, h0, c0 = sample(cell, name, norm)
    for b, n in enumerate(lengths or []):
        x[n:, b] = float("nan")
    exact = [wide(t) for t in (x, h0, c0, *w)]
    leaves = [None if t is None else t.requires_grad_() for t in (x, h0, c0, *w)]
    options = {
        "lengths": None if lengths is None else torch.tensor(lengths),
        "reset": torch.rand(T, B) < 0.3,
        "reverse": backwards,
    }
    true = reference.recurrence(*exact[:3], Weights(*exact[3:]), config, **options)
    with using("cpu"):
        fast = recurrence(x, h0, c0, w, config, **options)
    for a, e in zip(present(fast[:3]), present(true[:3]), strict=True):
        assert_close(a, e, kind="composed", count=T, scale=1.0)
    upstream = [torch.randn_like(t) for t in present(fast[:3])]
    got = torch.autograd.grad(present(fast[:3]), present(leaves), upstream)
    want = torch.autograd.grad(present(true[:3]), present(exact), [u.double() for u in upstream])
    for a, e in zip(got, want, strict=True):
        assert_close(a, e, kind="composed", count=T * B, scale=max(1.0, e.abs().max().item()))


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("variant", ["cooijmans2016", "laurent2015"])
@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
def test_batch_norm_layers_take_the_kernels_and_are_the_reference(cell, variant, training):
    """Outputs, gradients and the tables afterwards; the tables may change before the backward."""
    options = {"norm": "batch", "variant": variant, "num_stat_steps": 4, "bidirectional": True, "momentum": 0.3}
    layer = getattr(normwise, cell)(INPUT, HIDDEN, 2, **options)
    with torch.no_grad():
        for name, table in layer.named_buffers():
            table.add_(torch.rand_like(table) if "var" in name else torch.randn_like(table))
    exact = getattr(normwise, cell)(INPUT, HIDDEN, 2, **options, dtype=torch.float64)
    exact.load_state_dict(layer.state_dict())
    x, upstream = torch.randn(T, B, INPUT), torch.randn(T, B, 2 * HIDDEN)
    lengths, found = torch.tensor([6, 2, 4, 3, 5]), []
    for of, backend in ((layer, "cpu"), (exact, "reference")):
        leaves = [x.to(of.weight_ih_l0.dtype).requires_grad_(), *of.parameters()]
        with using(backend), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # longer than the tables
            output, states = of.train(training)(leaves[0], lengths=lengths)
        tables = [t.clone() for t in of.buffers()]
        with torch.no_grad():
            for table in of.buffers():
                table.zero_()
        grads = torch.autograd.grad(output, leaves, upstream.to(output.dtype))
        found.append([output, *(states if cell == "LSTM" else [states]), *tables, *grads])
    with ran() as took, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer(x, lengths=lengths)
    assert took == {"cpu"}
    for a, e in zip(*found, strict=True):
        assert_close(a, e, kind="composed", count=T * B, scale=max(1.0, e.abs().max().item()))


def test_running_statistics_in_float64_are_atens_loop():
    """As they are where somebody wants their averages exact; the kernels read float32."""
    layer, x = normwise.GRU(INPUT, HIDDEN, norm="batch", num_stat_steps=T).eval(), torch.randn(T, B, INPUT)
    wanted = layer(x)[0]
    for name, table in layer.named_buffers():
        setattr(layer, name, table.double())
    with ran() as took:
        assert_close(layer(x)[0], wanted, kind="composed", count=T)
    assert took == {"aten"}
    with normwise.backend("cpu"), pytest.raises(normwise.BackendError, match="running statistics in float32 alone"):
        layer(x)


def test_running_statistics_that_are_learnt_get_their_gradient():
    layer, x = normwise.LSTM(INPUT, HIDDEN, norm="batch", num_stat_steps=T).eval(), torch.randn(T, B, INPUT)
    tables, found = [t.requires_grad_() for t in layer.buffers()], []
    for backend in ("chosen", "reference"):
        with using(backend):
            found.append(torch.autograd.grad(layer(x)[0].square().sum(), tables))
    for a, e in zip(*found, strict=True):
        assert e.any()
        assert_close(a, e, kind="composed", count=T * B, scale=max(1.0, e.abs().max().item()))
    with normwise.backend("cpu"), pytest.raises(normwise.BackendError, match="no gradient of running statistics"):
        layer(x)
    with ran() as took, torch.no_grad():
        layer(x)
    assert took == {"cpu"}


def test_batch_norm_of_a_compiled_model_is_atens_loop():
    """No node takes tables or gives moments."""
    layer, x, graphs = normwise.RNN(INPUT, HIDDEN, norm="batch"), torch.randn(2, B, INPUT), []
    eager = layer(x)[0]
    assert_close(torch.compile(layer, backend=lambda g, _: graphs.append(g) or g.forward)(x)[0], eager, kind="composed")
    targets = [str(n.target) for g in graphs for n in g.graph.nodes]
    assert not any("normwise.recurrence" in target for target in targets)
    assert any("batch_norm" in target for target in targets)


@pytest.mark.parametrize("wanted", ["x", "h0", "c0", "weight_hh", "bias_c"])
@pytest.mark.parametrize("seen", ["output", "h", "c"])
def test_only_the_gradients_that_are_asked_for(wanted, seen):
    config, w, x, h0, c0 = sample("lstm", "ba2016", "layer")
    named = {"x": x, "h0": h0, "c0": c0, **w._asdict()}
    named[wanted].requires_grad_()
    with using("cpu"):
        result = recurrence(x, h0, c0, w, config, lengths=torch.tensor([6, 2, 4, 3, 5]))
    exact = {key: None if t is None else t.detach().double() for key, t in named.items()}
    exact[wanted].requires_grad_()
    tensors = list(exact.values())
    true = reference.recurrence(*tensors[:3], Weights(*tensors[3:]), config, lengths=torch.tensor([6, 2, 4, 3, 5]))
    upstream = torch.randn_like(getattr(result, seen))
    (got,) = torch.autograd.grad(getattr(result, seen), [named[wanted]], upstream)
    (want,) = torch.autograd.grad(getattr(true, seen), [exact[wanted]], upstream.double())
    assert_close(got, want, kind="composed", count=T * B, scale=max(1.0, want.abs().max().item()))


@pytest.mark.parametrize(
    ("cell", "name", "norm"),
    [("lstm", "ba2016", "layer"), ("gru", "dreamer", "rms"), ("lstm", "cooijmans2016", "batch")],
)
def test_a_second_derivative_is_the_references(cell, name, norm):
    config, w, x, h0, c0 = sample(cell, name, norm)
    exact = [wide(t) for t in (x, h0, c0, *w)]
    leaves = [None if t is None else t.requires_grad_() for t in (x, h0, c0, *w)]
    options = {"lengths": torch.tensor([6, 0, 4, 3, 5]), "reverse": True}
    upstream = torch.randn(T, B, HIDDEN)
    direction = torch.randn_like(x)
    seconds = []
    for run, tensors in ((recurrent_calls, leaves), (reference, exact)):
        output = run.recurrence(*tensors[:3], Weights(*tensors[3:]), config, **options).output
        (dx,) = torch.autograd.grad(output, [tensors[0]], upstream.to(output.dtype), create_graph=True)
        seconds.append(torch.autograd.grad((dx * direction).sum(), present(tensors), allow_unused=True))
    for a, e in zip(*seconds, strict=True):
        assert (a is None) == (e is None)
        if a is not None:
            assert_close(a, e, kind="composed", count=T * B, scale=max(1.0, e.abs().max().item()))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("steps", "batch", "hidden"), [(1, 1, 1), (70, 1, 33), (9, 17, 20), (3, 0, 4)])
def test_layers_of_odd_sizes_are_as_exact_as_atens_loop(steps, batch, hidden, threads):
    """Each tensor's median over draws, where an error below a rounding counts as one.

    Gains of a half keep the recurrence from magnifying a rounding beyond all others, when luck decides which of two
    errors is the larger. Of 2,500 ratios, on each of three instruction sets, none was above 1.85: that 2 is exceeded by
    five of ten draws is less likely than 1e-12. A wrong formula exceeds it in all of them.
    """
    ratios = {}
    for _ in range(10):
        layer = normwise.LSTM(INPUT, hidden, 2, bidirectional=True)
        with torch.no_grad():
            for name, parameter in layer.named_parameters():
                if name.startswith("gain"):
                    parameter.mul_(0.5)
        exact = normwise.LSTM(INPUT, hidden, 2, bidirectional=True, dtype=torch.float64)
        exact.load_state_dict(layer.state_dict())
        x, upstream = torch.randn(steps, batch, INPUT), torch.randn(steps, batch, 2 * hidden)
        torch.set_num_threads(threads)
        compiled = differentiated(layer, "cpu", x, upstream)
        torch.set_num_threads(1)
        by_loop, exactly = differentiated(layer, "aten", x, upstream), differentiated(exact, "chosen", x, upstream)
        for k, (fast, loop, truth) in enumerate(zip(compiled, by_loop, exactly, strict=True)):
            assert fast.shape == truth.shape
            assert fast.isfinite().all()
            if not truth.numel():
                continue
            rounding = 32 * torch.finfo(torch.float32).eps * max(1.0, truth.abs().max().item())
            error, loops_error = ((t - truth).abs().max().item() for t in (fast, loop))
            ratios.setdefault(k, []).append(max(error, rounding) / max(loops_error, rounding))
    assert all(statistics.median(of_tensor) <= 2 for of_tensor in ratios.values())


def differentiated(layer, backend, x, upstream):
    """Output, final states and all gradients."""
    given = x.to(layer.weight_ih_l0.dtype).requires_grad_()
    with using(backend):
        output, states = layer(given)
    grads = torch.autograd.grad(output, [given, *layer.parameters()], upstream.to(output.dtype))
    return [output, *states, *grads]


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (Recurrence("lstm", "batch", "input", statistics="sequence"), {}, "batch statistics of single steps, not of"),
        (Recurrence("lstm", "batch"), {"dtype": torch.bfloat16}, "statistics of a batch in float32 alone"),
        (Recurrence("lstm", "layer", "input"), {}, "no layer or RMS norm on the input term alone"),
        (Recurrence("lstm"), {"proj_size": 2}, "no projection"),
        (Recurrence("lstm", zoneout=0.1), {}, "no zoneout"),
        (Recurrence("lstm"), {"dtype": torch.float64}, "take float32 or bfloat16, not torch.float64"),
    ],
)
def test_what_the_kernels_cannot_do_is_said(config, options, message):
    dtype, proj_size = options.get("dtype", torch.float32), options.get("proj_size", 0)
    w = Weights(
        **{k: v.to(dtype) for k, v in random_weights(config.shapes(INPUT, HIDDEN, proj_size=proj_size)).items()}
    )
    x, h0 = torch.randn(T, B, INPUT, dtype=dtype), torch.zeros(B, proj_size or HIDDEN, dtype=dtype)
    c0 = torch.zeros(B, HIDDEN, dtype=dtype)
    with normwise.backend("cpu"), pytest.raises(normwise.BackendError, match=message):
        recurrence(x, h0, c0, w, config)
    assert recurrence(x, h0, c0, w, config).output.shape == (T, B, proj_size or HIDDEN)


def test_float32_layers_take_the_kernels_unasked():
    with ran() as found:
        normwise.LSTM(INPUT, HIDDEN, 2, bidirectional=True)(torch.randn(T, B, INPUT))
    assert found == {"cpu"}


@pytest.mark.parametrize("cast", ["dtype", "autocast"])
def test_bfloat16_layers_take_the_kernels_with_state_and_statistics_in_float32(cast, monkeypatch):
    """Also under autocast, which leaves gains and biases in float32."""
    seen = []
    kernel = cpu_rnn.KERNELS["layer"]
    noted = kernel._replace(forward=lambda of, save: seen.append(of.weights) or kernel.forward(of, save))
    monkeypatch.setitem(cpu_rnn.KERNELS, "layer", noted)
    layer = normwise.LSTM(INPUT, HIDDEN, 2, bidirectional=True, dtype=torch.bfloat16 if cast == "dtype" else None)
    x = torch.randn(T, B, INPUT, dtype=layer.weight_ih_l0.dtype, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=cast == "autocast"):
        output, (h, c) = layer(x, lengths=torch.tensor([6, 2, 4, 3, 5]))
    assert {t.dtype for t in (output, h, c)} == {torch.bfloat16}
    assert [w.weight_hh.dtype for w in seen] == [torch.bfloat16] * 4
    assert [w.gain_hh.dtype for w in seen] == [layer.gain_hh_l0.dtype] * 4
    grads = torch.autograd.grad(output, [x, *layer.parameters()], torch.randn_like(output))
    assert [g.dtype for g in grads] == [t.dtype for t in (x, *layer.parameters())]


def test_kernels_compute_in_float32_whatever_the_default_dtype_is():
    layer, x = normwise.LSTM(INPUT, HIDDEN), torch.randn(T, B, INPUT)
    wanted = layer(x)[0]
    torch.set_default_dtype(torch.float64)
    try:
        x.requires_grad_()
        output = layer(x)[0]
        output.sum().backward()
    finally:
        torch.set_default_dtype(torch.float32)
    assert output.dtype == x.grad.dtype == torch.float32
    assert torch.equal(output, wanted)


def test_a_negated_view_counts_as_its_values():
    layer, x = normwise.RNN(INPUT, HIDDEN), torch.randn(T, B, INPUT)
    state = torch._neg_view(torch.randn(1, B, HIDDEN))  # as `.conj().imag` is, but contiguous
    # Kernels do not read it, so that it takes another way, which rounds otherwise.
    assert_close(layer(x, state)[0], layer(x, state.resolve_neg())[0], kind="composed", count=T)
