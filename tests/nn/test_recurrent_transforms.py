"""What torch does to layers: autocast, low precision, compiling, copying, saving, second derivatives; odd sizes."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

from support.backends import using
from support.recurrent_cases import LAYERS
from support.tolerances import assert_close

T, B, INPUT, HIDDEN = 4, 3, 4, 6
KINDS = [(cell, norm) for cell in LAYERS for norm in ("layer", "rms", "batch")]


def build(cell, norm, **options):
    return LAYERS[cell](INPUT, HIDDEN, norm=norm, **options)


def parts(state):
    return list(state) if isinstance(state, tuple) else [state]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("cell", "norm"), [*KINDS, ("lstm", None)])
def test_low_precision_layers(cell, norm, dtype):
    layer = build(cell, norm, dtype=dtype, num_layers=2)
    x = torch.randn(T, B, INPUT, dtype=dtype)
    output, states = layer(x)
    assert {t.dtype for t in (output, *parts(states))} == {dtype}
    output.backward(torch.randn_like(output))
    assert {p.grad.dtype for p in layer.parameters()} == {dtype}
    exact = copy.deepcopy(layer).double()
    with using("reference"):
        assert_close(output, exact(x.double())[0], kind="composed", count=T * HIDDEN, scale=1.0)


@pytest.mark.parametrize(("cell", "norm"), KINDS)
def test_autocast_gives_bfloat16_near_the_float32_result(cell, norm):
    layer = build(cell, norm, num_layers=2, bidirectional=True)
    x = torch.randn(T, 16, INPUT)  # of few samples, batch statistics would magnify the rounding of each
    exact, _ = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, states = layer(x, lengths=[4, 2] * 8)
        whole, _ = layer(x)
    assert {t.dtype for t in (output, whole, *parts(states))} == {torch.bfloat16}
    # A norm over the cell divides the rounding errors of the gates by the cell's size, at first about a quarter.
    assert_close(whole, exact, kind="composed", count=T * HIDDEN, scale=4.0)
    output.backward(torch.randn_like(output))
    assert {p.grad.dtype for p in layer.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("cell", "norm", "training", "backend"),
    [(cell, norm, True, "eager") for cell, norm in KINDS]
    + [("lstm", "layer", True, "aot_eager"), ("rnn", "batch", True, "aot_eager"), ("gru", "batch", False, "eager")],
)
def test_compiles_in_one_graph(cell, norm, training, backend):
    torch._dynamo.reset()
    bidirectional = (cell, norm) == ("rnn", "layer")
    layer = build(cell, norm, dtype=torch.float64, bidirectional=bidirectional).train(training)
    twin = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    x = torch.randn(2, B, INPUT, dtype=torch.float64, requires_grad=True)
    call = {"lengths": torch.tensor([2, 1, 2]), "reset": torch.rand(2, B) < 0.3}
    results = []
    for net in (compiled, twin):
        output, states = net(x, **call)
        outs = [output, *parts(states)]
        torch.manual_seed(0)
        grads = torch.autograd.grad(outs, [x, *net.parameters()], [torch.randn_like(o) for o in outs])
        results.append([*outs, *grads, *net.buffers()])
    for a, b in zip(*results, strict=True):
        assert_close(a, b, kind="composed", scale=max(1.0, b.abs().max().item()))


@torch.no_grad()
@pytest.mark.parametrize("cell", LAYERS)
def test_a_compiled_model_calls_torchs_layer_as_it_is(cell):
    torch._dynamo.reset()
    layer = build(cell, None)
    x = torch.randn(T, B, INPUT)
    compiled = torch.compile(lambda x: layer(2 * x, lengths=[4, 2, 3])[0] + 1, backend="eager")
    with using("aten"):
        expected = layer(2 * x, lengths=[4, 2, 3])[0] + 1
    assert torch.equal(compiled(x), expected)


@torch.no_grad()
def test_compiled_steps():
    torch._dynamo.reset()
    layer = build("gru", "layer", dtype=torch.float64)
    step = torch.compile(layer.step, fullgraph=True, backend="eager")
    x = torch.randn(B, INPUT, dtype=torch.float64)
    _, state = step(x)
    again, _ = step(x, state, reset=torch.tensor([True, False, False]))
    expected, _ = layer.step(x, layer.step(x)[1], reset=torch.tensor([True, False, False]))
    assert_close(again, expected, kind="composed")


@pytest.mark.parametrize(("cell", "norm"), [*KINDS, ("gru", None)])
def test_copies_pickles_and_state_dicts(cell, norm):
    layer = build(cell, norm, num_layers=2, bidirectional=True).eval()
    x = torch.randn(T, B, INPUT)
    expected, _ = layer(x)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    loaded = build(cell, norm, num_layers=2, bidirectional=True).eval()
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded):
        assert torch.equal(twin(x)[0], expected)
        with torch.no_grad():
            twin.weight_hh_l0.zero_()
        assert torch.equal(layer(x)[0], expected)
    names = [name for group in layer.all_weights for name in group]
    assert all(parameter is not None for parameter in names)


@pytest.mark.parametrize("backend", ["chosen", "reference"])
@pytest.mark.parametrize(("cell", "norm"), KINDS)
def test_first_and_second_derivatives(cell, norm, backend):
    torch.manual_seed(1)
    layer = LAYERS[cell](2, 3, norm=norm, dtype=torch.float64)
    x = torch.randn(3, 3, 2, dtype=torch.float64, requires_grad=True)
    names = list(dict(layer.named_parameters()))
    tables = dict(layer.named_buffers())

    def call(x, *values):
        given = dict(zip(names, values, strict=True)) | {k: v.clone() for k, v in tables.items()}
        output, states = torch.func.functional_call(layer, given, (x,), {"lengths": [3, 2, 3]})
        return output, *parts(states)

    with using(backend):
        inputs = [x, *layer.parameters()]
        assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True, atol=1e-4)


@pytest.mark.parametrize(("cell", "norm"), [(cell, norm) for cell, norm in KINDS if norm != "batch"])
def test_vmap_over_models(cell, norm):
    layers = [build(cell, norm, dtype=torch.float64) for _ in range(2)]
    stacked, _ = torch.func.stack_module_state(layers)
    x = torch.randn(T, B, INPUT, dtype=torch.float64)

    def call(values):
        return torch.func.functional_call(layers[0], values, (x,))[0]

    for k, output in enumerate(torch.func.vmap(call)(stacked)):
        assert_close(output, layers[k](x)[0], kind="composed", scale=1.0)


@pytest.mark.parametrize("norm", ["layer", "rms", "batch", None])
@pytest.mark.parametrize("cell", LAYERS)
@pytest.mark.parametrize(("steps", "batch", "hidden"), [(1, 2, 3), (1000, 2, 3), (3, 0, 3), (3, 2, 1)])
def test_odd_sizes_match_the_reference(cell, norm, steps, batch, hidden):
    # Over many steps a recurrence may magnify float32's roundings, but hardly float64's.
    dtype = torch.float64 if steps > 100 else torch.float32
    options = {"num_stat_steps": steps} if norm == "batch" else {}
    if norm == "rms" and hidden == 1:  # a sign, smoothed by eps: near 0 it magnifies rounding by up to 1 / sqrt(eps)
        options["eps"] = 1e-3
    layer = LAYERS[cell](INPUT, hidden, norm=norm, dtype=dtype, **options)
    exact = copy.deepcopy(layer).double()
    x = torch.randn(steps, batch, INPUT, dtype=dtype, requires_grad=True)
    output, _ = layer(x)
    assert output.shape == (steps, batch, hidden)
    output.backward(torch.randn_like(output))
    assert torch.isfinite(x.grad).all()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())
    with using("reference"), torch.no_grad():
        truth, _ = exact(x.detach().double())
    assert_close(output, truth, kind="composed", count=steps * hidden, scale=1.0)


def test_the_layer_on_every_device(device):
    layer = build("lstm", "layer", num_layers=2, bidirectional=True).to(device)
    on_cpu = copy.deepcopy(layer).cpu()
    x = torch.randn(T, B, INPUT)
    call = {"lengths": torch.tensor([2, 4, 3]), "reset": torch.rand(T, B) < 0.3}
    output, _ = layer(x.to(device), lengths=call["lengths"], reset=call["reset"].to(device))
    assert_close(output, on_cpu(x, **call)[0], kind="composed", count=T * HIDDEN, scale=1.0)
