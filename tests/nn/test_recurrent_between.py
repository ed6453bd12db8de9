"""between= and residual=: a stack equals single layers with norm modules between them, in every form of a call."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.rnn import RNNBase
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import normwise
from support.backends import using
from support.recurrent_cases import LAYERS, away_from_start
from support.tolerances import assert_close

T, B, INPUT, HIDDEN, LAYER_COUNT = 5, 3, 4, 6, 3
LENGTHS = torch.tensor([3, 5, 2])
NORMS = {"layer": normwise.LayerNorm, "rms": normwise.RMSNorm}
# torch says so itself, once in a process.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")

KINDS: list[tuple[str, dict[str, Any]]] = [
    ("lstm", {}),
    ("lstm", {"norm": None}),
    ("lstm", {"norm": None, "proj_size": 3}),
    ("lstm", {"variant": "torchaudio", "proj_size": 2}),
    ("lstm", {"norm": "batch"}),
    ("lstm", {"norm": "rms", "variant": "haste"}),
    ("gru", {}),
    ("gru", {"norm": None}),
    ("gru", {"variant": "dreamer", "bias": False}),
    ("rnn", {"norm": "batch", "variant": "laurent2015"}),
    ("rnn", {"norm": None, "nonlinearity": "relu"}),
]
STACKS: list[dict[str, Any]] = [
    {"between": "layer", "residual": True, "bidirectional": True},
    {"between": "rms", "batch_first": True},
    {"residual": True},
]
# In float32 the C++ kernels run where there are some, in float64 loops over steps.
FORMS = [
    ("dense", torch.float32),
    ("unbatched", torch.float64),
    ("lengths", torch.float32),
    ("packed", torch.float64),
    ("reset", torch.float64),
]


def name_of(value: Any) -> str:
    return "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else str(value)


def build(cell: str, num_layers: int = LAYER_COUNT, **options: Any) -> Any:
    return away_from_start(LAYERS[cell](INPUT, HIDDEN, num_layers, **options))


def parts(state: Any) -> list[Tensor]:
    return list(state) if isinstance(state, tuple) else [state]


def rows(x: Any) -> Tensor:
    return x.data if isinstance(x, PackedSequence) else x


class ByHand(nn.Module):
    """Single layers with norm modules between them, which start from the tensors of a stack."""

    def __init__(self, cell: str, stack: Any, kind: dict[str, Any], options: dict[str, Any]) -> None:
        super().__init__()
        options = dict(options)
        self.residual, between = options.pop("residual", False), options.pop("between", None)
        self.dropout, self.batch_first = options.pop("dropout", 0.0), options.get("batch_first", False)
        self.directions = 1 + stack.bidirectional
        width = (stack.proj_size or HIDDEN) * self.directions
        self.layers, self.norms = nn.ModuleList(), nn.ModuleList()
        tensors = stack.state_dict()
        for k in range(stack.num_layers):
            single = LAYERS[cell](INPUT if k == 0 else width, HIDDEN, 1, **kind, **options)
            own = {n: tensors[n.replace("_l0", f"_l{k}")] for n in single.state_dict()}
            single.load_state_dict(own)
            self.layers.append(single)
            if between is not None and k + 1 < stack.num_layers:
                # A flag of its own for LayerNorm's bias; RMSNorm has none.
                bias = {"bias": kind.get("bias", True)} if between == "layer" else {}
                norm = NORMS[between](width, **bias, dtype=single.weight_ih_l0.dtype)
                with torch.no_grad():
                    norm.weight.copy_(tensors[f"gain_between_l{k}"])
                    if getattr(norm, "bias", None) is not None:
                        norm.bias.copy_(tensors[f"bias_between_l{k}"])
                self.norms.append(norm)

    def forward(self, x: Any, state: Any = None, **call: Any) -> Any:
        finals = []
        for k, layer in enumerate(self.layers):
            own = slice(k * self.directions, (k + 1) * self.directions)
            given = None if state is None else [s[own] for s in parts(state)]
            given = given if given is None else tuple(given) if len(given) == 2 else given[0]
            output, final = layer(x, given, **call)
            finals.append(parts(final))
            if self.residual and k:
                output = output._replace(data=output.data + x.data) if isinstance(x, PackedSequence) else output + x
            if k + 1 < len(self.layers):
                x = self.norms[k](output, **self._mask(output, call)) if len(self.norms) else output
                x = F.dropout(x, self.dropout) if self.dropout and self.training else x
        states = [torch.cat(s) for s in zip(*finals, strict=True)]
        return output, tuple(states) if len(states) == 2 else states[0]

    def _mask(self, output: Any, call: dict[str, Any]) -> dict[str, Tensor]:
        if "lengths" not in call:
            return {}
        valid = torch.arange(T)[:, None] < call["lengths"]
        return {"mask": valid.T if self.batch_first else valid}

    def gradients(self) -> dict[str, Tensor | None]:
        """By the names of the stack's parameters."""
        found = {}
        for k, layer in enumerate(self.layers):
            found |= {n.replace("_l0", f"_l{k}"): p.grad for n, p in layer.named_parameters()}
        for k, norm in enumerate(self.norms):
            found[f"gain_between_l{k}"] = norm.weight.grad
            if getattr(norm, "bias", None) is not None:
                found[f"bias_between_l{k}"] = norm.bias.grad
        return found


def call_in(form: str, x: Tensor, batch_first: bool) -> tuple[Any, dict[str, Any]]:
    """The input and keyword arguments of a call, from x (T, B, I)."""
    if form == "packed":
        return pack_padded_sequence(x, LENGTHS, enforce_sorted=False), {}
    if form == "unbatched":
        return x[:, 0], {}
    x = x.transpose(0, 1) if batch_first else x
    if form == "lengths":
        return x, {"lengths": LENGTHS}
    reset = torch.rand(*x.shape[:2]) < 0.3
    return x, {"reset": reset} if form == "reset" else {}


def compare(stack: Any, hand: ByHand, x: Tensor, form: str, **tolerances: Any) -> None:
    """Outputs, states, every gradient and all running statistics of both."""
    results = []
    dtype = x.dtype
    seed = int(torch.randint(1 << 30, ()))
    for net in (stack, hand):
        torch.manual_seed(seed)
        leaf = x.clone().requires_grad_()
        given, call = call_in(form, leaf, stack.batch_first)
        shape = (LAYER_COUNT * (1 + stack.bidirectional), B)
        sizes = [stack.proj_size or HIDDEN] + [HIDDEN] * (stack.cell == "lstm")
        states = [torch.randn(*shape, size, dtype=dtype) for size in sizes]
        states = [s[:, 0] if form == "unbatched" else s for s in states]
        states = [s.requires_grad_() for s in states]
        output, final = net(given, tuple(states) if len(states) == 2 else states[0], **call)
        outs = [rows(output), *parts(final)]
        torch.autograd.backward(outs, [torch.randn(o.shape, dtype=dtype) for o in outs])
        gradients = {n: p.grad for n, p in stack.named_parameters()} if net is stack else hand.gradients()
        gradients |= {"x": leaf.grad} | {f"state {n}": s.grad for n, s in enumerate(states)}
        results.append((outs, gradients))
    (found, gradients), (expected, truth) = results
    for a, e in zip(found, expected, strict=True):
        assert_close(a, e, **{"kind": "composed", "scale": 1.0, **tolerances})
    assert set(gradients) == set(truth)
    for name, gradient in gradients.items():
        scale = max(1.0, truth[name].abs().max().item())
        assert_close(
            gradient, truth[name], **{"kind": "composed", "count": T * B, **tolerances}, scale=scale, name=name
        )
    for name, table in stack.named_buffers():
        k = next(k for k in range(LAYER_COUNT) if f"_l{k}" in name)
        assert_close(table, getattr(hand.layers[k], name.replace(f"_l{k}", "_l0")), kind="composed", scale=1.0)


@pytest.mark.parametrize(("form", "dtype"), FORMS)
@pytest.mark.parametrize("options", STACKS, ids=name_of)
@pytest.mark.parametrize(("cell", "kind"), KINDS, ids=name_of)
def test_a_stack_equals_single_layers_with_norms_between_them(cell, kind, options, form, dtype):
    if kind.get("norm") == "batch":
        dtype = torch.float64  # statistics of three samples magnify float32's roundings
        form = "dense" if form == "unbatched" else form  # one sample has none
    stack = build(cell, **kind, **options, dtype=dtype)
    hand = ByHand(cell, stack, kind | {"dtype": dtype}, options)
    compare(stack, hand, torch.randn(T, B, INPUT, dtype=dtype), form)


@pytest.mark.parametrize("backend", ["kernels", "no kernels", "aten", "reference"])
@pytest.mark.parametrize("form", ["dense", "lengths"])
@pytest.mark.parametrize("options", STACKS, ids=name_of)
@pytest.mark.parametrize(
    ("cell", "kind"), [("lstm", {}), ("gru", {"norm": None}), ("rnn", {"norm": "rms"})], ids=name_of
)
def test_on_each_backend(cell, kind, options, form, backend):
    stack = build(cell, **kind, **options)
    hand = ByHand(cell, stack, kind, options)
    with using(backend):
        compare(stack, hand, torch.randn(T, B, INPUT), form)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("cell", "kind"), [("lstm", {}), ("gru", {"norm": None})], ids=name_of)
def test_in_half_precision(cell, kind, dtype):
    options = {"between": "layer", "residual": True, "bidirectional": True}
    stack = build(cell, **kind, **options, dtype=dtype)
    x = torch.randn(T, B, INPUT, dtype=dtype)
    output, states = stack(x, lengths=LENGTHS)
    assert {t.dtype for t in (output, *parts(states))} == {dtype}
    output.backward(torch.randn_like(output))
    assert {p.grad.dtype for p in stack.parameters()} == {dtype}
    with using("reference"):
        exact, _ = copy.deepcopy(stack).double()(x.double(), lengths=LENGTHS)
    # A norm between layers divides roundings by a deviation of about a third, two of them after each other.
    assert_close(output, exact, kind="composed", count=T * HIDDEN, scale=4.0)


@pytest.mark.parametrize("backend", ["chosen", "aten"])
@pytest.mark.parametrize(("cell", "norm"), [("lstm", "layer"), ("lstm", None), ("rnn", None)])
def test_autocast_gives_the_dtype_that_it_gives_without_them(cell, norm, backend):
    stack = build(cell, norm=norm, between="layer", residual=True)
    x = torch.randn(T, B, INPUT)
    exact, _ = stack(x)
    with using(backend), torch.autocast("cpu", dtype=torch.bfloat16):
        output, states = stack(x)
        bare, bare_states = LAYERS[cell](INPUT, HIDDEN, LAYER_COUNT, norm=norm)(x)
    assert [t.dtype for t in (output, *parts(states))] == [t.dtype for t in (bare, *parts(bare_states))]
    assert_close(output, exact, kind="composed", dtype=torch.bfloat16, count=T * HIDDEN, scale=4.0)
    output.backward(torch.randn_like(output))
    assert {p.grad.dtype for p in stack.parameters()} == {torch.float32}


@pytest.mark.parametrize("norm", ["layer", None])
def test_dropout_follows_the_norm_and_draws_as_before(norm):
    options = {"between": "layer", "residual": True, "dropout": 0.4}
    kind = {"norm": norm, "zoneout": 0.3, "dtype": torch.float64} if norm else {"norm": norm, "dtype": torch.float64}
    stack = build("gru", **kind, **options)
    compare(stack, ByHand("gru", stack, kind, options), torch.randn(T, B, INPUT, dtype=torch.float64), "dense")
    stack.eval()
    x = torch.randn(T, B, INPUT, dtype=torch.float64)
    assert torch.equal(stack(x)[0], stack(x)[0])


@pytest.mark.parametrize("between", ["layer", "rms"])
@pytest.mark.parametrize("norm", ["layer", None])
def test_nothing_of_padding_gets_in_and_no_bias_gets_out(norm, between):
    stack = build("lstm", norm=norm, between=between, residual=True, bidirectional=True)
    x = torch.randn(T, B, INPUT)
    spoiled = x.clone()
    for b, length in enumerate(LENGTHS):
        spoiled[length:, b] = float("nan")
    spoiled.requires_grad_()
    output, _ = stack(spoiled, lengths=LENGTHS)
    output.backward(torch.randn_like(output))
    for b, length in enumerate(LENGTHS):
        assert (output[length:, b] == 0).all()
        assert (spoiled.grad[length:, b] == 0).all()
        assert_close(output[:length, b], stack(x[:length, b])[0], kind="composed", scale=1.0)
    assert all(p.grad.isfinite().all() for p in stack.parameters())


def test_an_empty_sequence_keeps_its_state():
    stack = build("gru", between="layer", residual=True)
    h = torch.randn(LAYER_COUNT, 2, HIDDEN)
    output, state = stack(torch.randn(T, 2, INPUT), h, lengths=[T, 0])
    assert torch.equal(state[:, 1], h[:, 1])
    assert (output[:, 1] == 0).all()


@pytest.mark.parametrize(("cell", "norm"), [("lstm", "layer"), ("gru", None), ("rnn", "rms"), ("lstm", "batch")])
@pytest.mark.parametrize("options", [{"between": "layer", "residual": True}, {"between": "rms"}], ids=name_of)
def test_steps_give_the_numbers_of_the_sequence(cell, norm, options):
    stack = build(cell, norm=norm, **options, dtype=torch.float64).eval()
    x, reset = torch.randn(T, B, INPUT, dtype=torch.float64), torch.rand(T, B) < 0.3
    whole, finals = stack(x, reset=reset)
    state = None
    for t in range(T):
        output, state = stack.step(x[t], state, reset=reset[t], step=t)
        assert_close(output, whole[t], kind="composed", scale=1.0)
    for a, b in zip(parts(state), parts(finals), strict=True):
        assert_close(a, b, kind="composed", scale=1.0)
    alone, _ = stack.step(x[0, 0], step=0)
    assert_close(alone, whole[0, 0], kind="composed", scale=1.0)


@pytest.mark.parametrize("backend", ["chosen", "reference"])
@pytest.mark.parametrize(("cell", "norm"), [("lstm", "layer"), ("gru", None), ("rnn", "batch")])
@pytest.mark.parametrize("between", ["layer", "rms"])
def test_first_and_second_derivatives(cell, norm, between, backend):
    stack = away_from_start(LAYERS[cell](2, 3, 2, norm=norm, between=between, residual=True, dtype=torch.float64))
    x = torch.randn(3, 3, 2, dtype=torch.float64, requires_grad=True)
    names, tables = list(dict(stack.named_parameters())), dict(stack.named_buffers())

    def call(x, *values):
        given = dict(zip(names, values, strict=True)) | {k: v.clone() for k, v in tables.items()}
        output, states = torch.func.functional_call(stack, given, (x,), {"lengths": [3, 2, 3]})
        return output, *parts(states)

    with using(backend):
        inputs = [x, *stack.parameters()]
        assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True, atol=1e-4)


@pytest.mark.parametrize("norm", ["layer", None])
def test_vmap_over_models_and_gradients_of_each_sample(norm):
    stacks = [build("lstm", norm=norm, between="layer", residual=True, dtype=torch.float64) for _ in range(2)]
    stacked, _ = torch.func.stack_module_state(stacks)
    x = torch.randn(T, B, INPUT, dtype=torch.float64)

    def call(values, x, lengths=None):
        return torch.func.functional_call(stacks[0], values, (x,), {"lengths": lengths})[0]

    for k, output in enumerate(torch.func.vmap(call, (0, None))(stacked, x)):
        assert_close(output, stacks[k](x)[0], kind="composed", scale=1.0)

    def loss(values, x, length):
        return call(values, x[:, None], length[None]).square().sum()

    own = {n: p.detach() for n, p in stacks[0].named_parameters()}
    each = torch.func.vmap(torch.func.grad(loss), (None, 1, 0))(own, x, LENGTHS)
    for b, length in enumerate(LENGTHS):
        stacks[0].zero_grad()
        stacks[0](x[:length, b])[0].square().sum().backward()
        for name, parameter in stacks[0].named_parameters():
            scale = max(1.0, parameter.grad.abs().max().item())
            assert_close(each[name][b], parameter.grad, kind="composed", count=T, scale=scale, name=name)


@pytest.mark.parametrize(
    ("cell", "norm", "backend"), [("lstm", "layer", "eager"), ("gru", "rms", "aot_eager"), ("lstm", None, "eager")]
)
@pytest.mark.parametrize("with_lengths", [True, False])
# torch.compile says so of any two layers of torch.nn, one behind the other.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiles(cell, norm, backend, with_lengths):
    torch._dynamo.reset()
    options = {"between": "layer", "residual": True, "bidirectional": True}
    stack = build(cell, 2, norm=norm, **options, dtype=torch.float64)
    twin = copy.deepcopy(stack)
    # torch.compile leaves torch's own kernels as they are, which breaks the graph.
    compiled = torch.compile(stack, fullgraph=norm is not None, backend=backend)
    x = torch.randn(T, B, INPUT, dtype=torch.float64, requires_grad=True)
    results = []
    for net in (compiled, twin):
        output, states = net(x, **({"lengths": LENGTHS} if with_lengths else {}))
        outs = [output, *parts(states)]
        torch.manual_seed(0)
        grads = torch.autograd.grad(outs, [x, *net.parameters()], [torch.randn_like(o) for o in outs])
        results.append([*outs, *grads])
    for a, b in zip(*results, strict=True):
        assert_close(a, b, kind="composed", count=T * B, scale=max(1.0, b.abs().max().item()))


@torch.no_grad()
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_exports(norm):
    stack = build("lstm", norm=norm, between=norm, residual=True).eval()
    x = torch.randn(T, B, INPUT)
    program = torch.export.export(stack, (x,), {"lengths": LENGTHS})
    assert_close(program.module()(x, lengths=LENGTHS)[0], stack(x, lengths=LENGTHS)[0], kind="composed", scale=1.0)


@pytest.mark.parametrize("norm", ["layer", "batch", None])
def test_copies_pickles_and_state_dicts(norm):
    options = {"norm": norm, "between": "layer", "residual": True}
    stack = build("lstm", **options).eval()
    x = torch.randn(T, B, INPUT)
    expected, _ = stack(x)
    loaded = LAYERS["lstm"](INPUT, HIDDEN, LAYER_COUNT, **options).eval()
    loaded.load_state_dict(stack.state_dict())
    for twin in (loaded, copy.deepcopy(stack), pickle.loads(pickle.dumps(stack))):
        assert torch.equal(twin(x)[0], expected)
        with torch.no_grad():
            twin.gain_between_l0.zero_()
        assert not torch.equal(twin(x)[0], expected)
        assert torch.equal(stack(x)[0], expected)


def test_layers_pickled_before_there_was_a_between_have_none():
    stack = build("gru")
    expected, _ = stack(x := torch.randn(T, B, INPUT))
    for name in ("between", "residual"):
        del vars(stack)[name]
    old = pickle.loads(pickle.dumps(stack))
    assert torch.equal(old(x)[0], expected)
    assert "between" not in repr(old)


@pytest.mark.parametrize("norm", ["layer", None])
def test_what_it_learns_starts_as_that_of_a_norm_module(norm):
    stack = LAYERS["lstm"](INPUT, HIDDEN, LAYER_COUNT, norm=norm, between="layer", bidirectional=True)
    names = [n for n, _ in stack.named_parameters() if "between" in n]
    assert sorted(names) == [f"{n}_between_l{k}" for n in ("bias", "gain") for k in range(LAYER_COUNT - 1)]
    away_from_start(stack)
    stack.reset_parameters()
    for name in names:
        assert torch.equal(stack.get_parameter(name), torch.full((2 * HIDDEN,), float(name.startswith("gain"))))
    assert not any("bias" in n for n, _ in LAYERS["lstm"](4, 6, 2, bias=False, between="layer").named_parameters())
    rms = LAYERS["lstm"](INPUT, HIDDEN, 2, proj_size=3, between="rms")
    assert {n: tuple(p.shape) for n, p in rms.named_parameters() if "between" in n} == {"gain_between_l0": (3,)}
    assert "between='rms'" in repr(rms)
    assert "residual" not in repr(rms)


def test_weights_start_as_without_it():
    nets = []
    for options in ({}, {"between": "layer", "residual": True}):
        torch.manual_seed(1)
        nets.append(LAYERS["gru"](INPUT, HIDDEN, 2, **options))
    for name, parameter in nets[0].named_parameters():
        assert torch.equal(parameter, nets[1].get_parameter(name))


def test_the_output_of_a_residual_stack_may_be_changed_in_place():
    stack = build("lstm", residual=True)
    x = torch.randn(T, B, INPUT)
    output, _ = stack(x)
    output += 1.0
    output.sum().backward()
    changed = [p.grad.clone() for p in stack.parameters()]
    stack.zero_grad()
    (stack(x)[0] + 1.0).sum().backward()
    for a, p in zip(changed, stack.parameters(), strict=True):
        assert torch.equal(a, p.grad)


def test_cudnn_gets_the_weights_of_one_layer_as_one_block(monkeypatch):
    """Each layer is a call of its own there, and warns of weights that are a part of something larger."""
    stack = build("lstm", norm=None, between="layer", bidirectional=True)
    flat, seen = list(stack._flat_weights), []

    def note(layer):
        assert all(w is getattr(layer, n) for w, n in zip(layer._flat_weights, layer._flat_weights_names, strict=True))
        seen.append((layer.num_layers, layer.input_size, layer._flat_weights_names[0], len(layer._flat_weights)))

    monkeypatch.setattr(RNNBase, "flatten_parameters", note)
    stack.flatten_parameters()
    assert seen == [(1, INPUT, "weight_ih_l0", 8), *((1, 2 * HIDDEN, f"weight_ih_l{k}", 8) for k in (1, 2))]
    assert (stack.num_layers, stack.input_size) == (LAYER_COUNT, INPUT)
    assert all(a is b for a, b in zip(stack._flat_weights, flat, strict=True))


@pytest.mark.parametrize("layer", LAYERS.values())
def test_bad_arguments(layer):
    with pytest.raises(ValueError, match=r"between='batch' is not known: expected 'layer', 'rms' or None"):
        layer(4, 6, 2, between="batch")
    with pytest.raises(TypeError, match=r"residual must be True or False.*got str"):
        layer(4, 6, 2, residual="yes")
    with pytest.warns(UserWarning, match="num_layers=1 has no two") as warned:
        single = layer(4, 6, between="layer")
    assert warned[0].filename == __file__
    assert not any("between" in n for n, _ in single.named_parameters())
    assert single(torch.zeros(T, B, 4))[0].shape == (T, B, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(4, 6)


def test_converting():
    model = nn.Sequential(nn.LSTM(INPUT, HIDDEN, 2, dropout=0.1))
    converted, _ = normwise.convert(model, recurrent="rms", between="layer", residual=True)
    new = converted[0]
    assert (new.between, new.residual, new.recurrence.norm) == ("layer", True, "rms")
    made = normwise.LSTM.from_torch(model[0], between="rms")
    assert made.gain_between_l0.shape == (HIDDEN,)
    bare = nn.Sequential(build("gru", norm=None, between="layer", residual=True))
    with pytest.raises(ValueError, match="nothing but dropout between layers, this one between='layer' and residual="):
        normwise.convert(bare, to="torch")
    inside, _ = normwise.convert(copy.deepcopy(bare), recurrent="layer")
    assert (inside[0].between, inside[0].residual, inside[0].recurrence.norm) == ("layer", True, "layer")
    assert torch.equal(inside[0].bias_between_l1, bare[0].bias_between_l1)


def test_its_gains_and_biases_are_found_as_a_norms():
    stack = LAYERS["gru"](INPUT, HIDDEN, 2, norm=None, between="layer")
    found = normwise.norm_parameters(nn.Sequential(stack))
    assert list(found.gains) == ["0.gain_between_l0"]
    assert list(found.biases) == ["0.bias_between_l0"]


@pytest.mark.parametrize("options", [STACKS[0], {"between": "rms"}, STACKS[2]], ids=name_of)
@pytest.mark.parametrize("norm", ["layer", None])
def test_diagnose_recomputes_the_very_layer(norm, options):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = build("lstm", norm=norm, **options), nn.LazyLinear(2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x)[0].mean(0))

    net = Net()
    net(torch.zeros(T, B, INPUT))
    found = normwise.diagnose(net, [(torch.randn(T, B, INPUT), torch.randint(2, (B,)))], loss=F.cross_entropy)
    places = next(layer for layer in found.layers if layer.name == "rnn").recurrence
    assert len(places) == LAYER_COUNT * (1 + net.rnn.bidirectional)
    assert max(place.error for place in places) < 1e-5
