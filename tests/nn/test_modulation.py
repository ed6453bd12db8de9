"""scale= and shift= in the call: adaptive norms equal their plain formulas."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils.rnn import pack_sequence

import normwise
from normwise import functional
from support.modulated_norms import CASES, DTYPES, C, N, in_float64, leaves, made
from support.tolerances import assert_close

each_case = pytest.mark.parametrize("name", CASES)
each_mode = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_mode
@each_case
def test_equals_the_formula(name, training, dtype):
    case, layer = CASES[name], made(name, dtype, training)
    drawn = (torch.randn(shape, dtype=torch.float64) for shape in (case.shape, case.sample, case.sample))
    x, scale, shift = leaves(*drawn, dtype=dtype)
    upstream = torch.randn(case.shape, dtype=torch.float64).to(dtype)
    for use in ("both", "scale", "shift"):
        truth = leaves(x, scale, shift, dtype=torch.float64)
        s = truth[1].reshape(case.placed) if use != "shift" else None
        t = truth[2].reshape(case.placed) if use != "scale" else None
        expected = in_float64(layer, truth[0], s, t)
        given = {"scale": scale if s is not None else None, "shift": shift if t is not None else None}
        y = layer(x, **given)
        assert y.dtype == dtype
        # bfloat16 shows that nothing is rounded on the way: it is held to a single rounding.
        kind = "forward" if dtype == torch.bfloat16 else "composed"
        assert_close(y, expected, kind=kind, count=x.numel(), scale=float(expected.detach().abs().max()))
        wanted = [i for i, v in enumerate((x, given["scale"], given["shift"])) if v is not None]
        inputs = [(x, scale, shift)[i] for i in wanted]
        found = torch.autograd.grad(y, inputs, upstream)
        true = torch.autograd.grad(expected, [truth[i] for i in wanted], upstream.double())
        for a, b in zip(found, true, strict=True):
            assert_close(a, b, kind="grad" if dtype == torch.bfloat16 else "composed", count=x.numel())


@each_mode
@each_case
def test_gradients_of_gain_and_bias_and_running_statistics(name, training):
    case, layer = CASES[name], made(name, torch.float64, training)
    plain = copy.deepcopy(layer)
    x, scale, shift = (torch.randn(shape, dtype=torch.float64) for shape in (case.shape, case.sample, case.sample))
    act, plain.act = plain.act, None
    y = plain(x) * (1 + scale.reshape(case.placed)) + shift.reshape(case.placed)
    expected = y if act is None else getattr(F, act)(y)
    upstream = torch.randn_like(x)
    found = layer(x, scale=scale, shift=shift)
    assert_close(found, expected, kind="composed")
    if any(p.requires_grad for p in layer.parameters()):
        for a, b in zip(
            torch.autograd.grad(found, list(layer.parameters()), upstream),
            torch.autograd.grad(expected, list(plain.parameters()), upstream),
            strict=True,
        ):
            assert_close(a, b, kind="composed", count=x.numel())
    for a, b in zip(layer.buffers(), plain.buffers(), strict=True):
        assert_close(a.double(), b.double(), kind="composed")


@pytest.mark.parametrize("name", ["layer", "layer, dim=1", "rms", "group", "instance2d", "batch2d", "frozen"])
def test_by_position(name):
    """SPADE: a scale and a shift of the input's shape, or of what broadcasts to it."""
    case, layer = CASES[name], made(name, torch.float64)
    x, scale, shift = torch.randn(3, *case.shape, dtype=torch.float64)
    for s, t in ((scale, shift), (scale[:1], shift[..., :1])):
        assert_close(layer(x, scale=s, shift=t), in_float64(layer, x, s, t), kind="composed", count=x.numel())


@pytest.mark.parametrize("name", ["layer", "layer of two axes", "layer, dim=1", "rms", "group", "instance2d", "sync"])
def test_one_for_all(name):
    case, layer = CASES[name], made(name, torch.float64)
    x = torch.randn(case.shape, dtype=torch.float64)
    scale, shift = torch.randn(2, *case.sample[1:], dtype=torch.float64)
    s, t = (v.reshape(1, *case.placed[1:]) for v in (scale, shift))
    if case.sample == (N, C) and "layer" not in name and name != "rms":
        scale, shift = scale[None], shift[None]  # norms of channels tell it by its number of axes from a gain
    assert_close(layer(x, scale=scale, shift=shift), in_float64(layer, x, s, t), kind="composed", count=x.numel())


@pytest.mark.parametrize("by", ["sample", "position"])
@each_case
def test_padding_does_not_leak(name, by):
    case, layer = CASES[name], made(name, torch.float64)
    if name == "batch1d":
        mask = torch.tensor([True, True, False])
    elif "layer" in name or name == "rms":
        axis = 1 if "dim" in name else len(case.shape) - 1
        mask = torch.rand(*case.shape[:axis], *case.shape[axis + 1 :]) < 0.7
        mask[0] = True
    else:
        mask = torch.rand(N, *case.shape[2:]) < 0.7
        mask[0] = True
    if len(case.shape) > 2:
        mask[2] = False  # a whole sample: its scale is not to be seen
    if name == "ghost":
        mask[2].view(-1)[:2] = True
    axis = case.shape.index(C) if "dim" in name else len(case.shape) - 1 if "layer" in name or name == "rms" else 1
    valid = mask.unsqueeze(axis).expand(case.shape)
    shape = case.sample if by == "sample" else case.shape
    x = torch.randn(case.shape, dtype=torch.float64)
    scale, shift = torch.randn(2, *shape, dtype=torch.float64)
    placed = case.placed if by == "sample" else case.shape
    seen = valid.reshape(*valid.shape)
    for d, size in enumerate(placed):
        seen = seen.any(d, keepdim=True) if size == 1 else seen
    seen = seen.expand(placed).reshape(shape)
    spoilt = [x.masked_fill(~valid, torch.nan), *(t.masked_fill(~seen, torch.nan) for t in (scale, shift))]
    clean = leaves(x, scale, shift, dtype=torch.float64)
    spoilt = leaves(*spoilt, dtype=torch.float64)
    expected = in_float64(layer, clean[0], clean[1].reshape(placed), clean[2].reshape(placed), mask=mask)
    expected = expected.masked_fill(~valid, 0)
    y = layer(spoilt[0], mask=mask, scale=spoilt[1], shift=spoilt[2])
    assert_close(y, expected, kind="composed", count=x.numel())
    assert not y[~valid].any()
    upstream = torch.randn_like(x)
    ours = [p for p in layer.parameters() if p.requires_grad]
    found = torch.autograd.grad(y, [*spoilt, *ours], upstream)
    true = torch.autograd.grad(expected, clean, upstream)
    for a, b, where in zip(found, true, (valid, seen, seen), strict=False):
        assert_close(a, b, kind="composed", count=x.numel())
        assert not a[~where].any()
    assert all(bool(g.isfinite().all()) for g in found)


def test_lengths_and_residual():
    layer = normwise.BatchNorm1d(C, act="relu", dim=-1).double()
    x, r = torch.randn(2, N, 6, C, dtype=torch.float64)
    scale, shift = torch.randn(2, N, C, dtype=torch.float64)
    lengths = torch.tensor([6, 2, 4])
    valid = (torch.arange(6) < lengths[:, None])[..., None]
    plain = copy.deepcopy(layer)
    plain.act = None
    z = plain(x, lengths=lengths) * (1 + scale[:, None]) + shift[:, None]
    expected = torch.relu(z + r).masked_fill(~valid, 0)
    assert_close(layer(x, lengths=lengths, residual=r, scale=scale, shift=shift), expected, kind="composed")


@pytest.mark.parametrize("name", ["group", "instance3d", "instance1d", "batch2d", "frozen"])
def test_residual_behind_scale_and_shift(name):
    case, layer = CASES[name], made(name, torch.float64, training=False)
    x, r = torch.randn(2, *case.shape, dtype=torch.float64)
    scale = torch.randn(case.sample, dtype=torch.float64)
    act, layer.act = layer.act, None
    z = layer(x) * (1 + scale.reshape(case.placed)) + r
    layer.act = act
    assert_close(layer(x, residual=r, scale=scale), z if act is None else getattr(F, act)(z), kind="composed")


SECOND = ["layer", "layer, dim=1", "rms", "group", "instance2d", "batch1d", "batch2d", "frozen"]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", SECOND)
def test_second_derivatives(name, training):
    case, layer = CASES[name], made(name, torch.float64, training)
    if training and hasattr(layer, "running_mean"):
        layer.track_running_stats, layer.running_mean, layer.running_var = name == "frozen", None, None
        if name == "frozen":
            return
    layer.act = None if layer.act == "relu" else layer.act
    shapes = (case.shape, case.sample, case.sample)
    given = leaves(*(torch.randn(shape, dtype=torch.float64) for shape in shapes), dtype=torch.float64)
    gated = isinstance(layer, (nn.LayerNorm, nn.RMSNorm))
    if gated:
        given += leaves(torch.randn(case.shape, dtype=torch.float64), dtype=torch.float64)
    parameters = dict(layer.named_parameters())

    def call(x: Tensor, scale: Tensor, shift: Tensor, *rest: Tensor) -> Tensor:
        options = {"gate": rest[0]} if gated else {}
        values = dict(zip(parameters, rest[gated:], strict=True))
        return torch.func.functional_call(layer, values, (x,), {"scale": scale, "shift": shift, **options})

    given += leaves(*parameters.values(), dtype=torch.float64)
    assert gradcheck(call, given, fast_mode=True)
    assert gradgradcheck(call, given, fast_mode=True)


@pytest.mark.parametrize("name", ["layer", "group", "instance2d", "batch2d", "frozen"])
def test_compiles_in_one_graph(name):
    torch._dynamo.reset()
    case = CASES[name]
    layer = made(name)
    twin = copy.deepcopy(layer)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    x, scale, shift = (torch.randn(shape) for shape in (case.shape, case.sample, case.sample))
    gate = {"gate": torch.randn(case.shape)} if name == "layer" else {}
    y, z = (
        f(x, scale=s, shift=shift, **gate)
        for f, s in ((layer, scale.clone().requires_grad_()), (compiled, scale.requires_grad_()))
    )
    assert_close(z, y, kind="composed", count=x.numel())
    z.square().sum().backward()
    assert scale.grad is not None
    for a, b in zip(twin.buffers(), layer.buffers(), strict=True):
        assert_close(a.float(), b.float(), kind="composed")


@pytest.mark.parametrize("name", ["layer", "rms", "group", "instance2d", "batch2d", "renorm", "frozen"])
def test_one_node_of_torch_fx(name):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = made(name)

        def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
            return self.norm(x, scale=scale, shift=shift)

    case, net = CASES[name], Net()
    x, scale, shift = (torch.randn(shape) for shape in (case.shape, case.sample, case.sample))
    graph = torch.fx.symbolic_trace(copy.deepcopy(net))
    assert [n.op for n in graph.graph.nodes] == ["placeholder"] * 3 + ["call_module", "output"]
    assert torch.equal(graph(x, scale, shift), net(x, scale, shift))


def test_functionals_and_torch_fx():
    x, w = torch.randn(N, C, 5), torch.rand(C)
    scale, shift = torch.randn(2, N, C)
    s, t = scale[..., None], shift[..., None]
    calls = {
        "batch_norm": (lambda x, **o: functional.batch_norm(x, weight=w, bias=w, training=True, **o), x),
        "group_norm": (lambda x, **o: functional.group_norm(x, 2, w, w, **o), x),
        "instance_norm": (lambda x, **o: functional.instance_norm(x, weight=w, bias=w, **o), x),
        "layer_norm": (lambda x, **o: functional.layer_norm(x, [C], w, w, dim=1, **o), x),
        "rms_norm": (lambda x, **o: functional.rms_norm(x, [C], w, dim=1, **o), x),
    }
    for name, (call, x) in calls.items():
        y = call(x, scale=scale, shift=shift)
        assert_close(y, call(x) * (1 + s) + t, kind="composed", count=x.numel(), name=name)

        class Net(nn.Module):
            def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
                return calls[name][0](x, scale=scale, shift=shift)  # noqa: B023  traced in this turn of the loop

        graph = torch.fx.symbolic_trace(Net())
        assert torch.equal(graph(x, scale, shift), y)


def test_one_sample_without_a_batch():
    layer = normwise.InstanceNorm1d(C, affine=True)
    x, scale = torch.randn(C, 7), torch.randn(C)
    assert_close(layer(x, scale=scale), layer(x) * (1 + scale[:, None]), kind="composed", count=7)


def test_autocast_takes_the_dtype_of_the_input():
    layer, to_scale = normwise.LayerNorm(C), nn.Linear(2, C)
    x, c = torch.randn(N, 5, C), torch.randn(N, 2)
    with torch.autocast("cpu", torch.bfloat16):
        scale = to_scale(c)
        y = layer(x, scale=scale)
    assert scale.dtype == torch.bfloat16
    assert y.dtype == torch.float32
    assert_close(y, layer(x) * (1 + scale.float()[:, None]), kind="composed", count=C)


def test_cast_to_the_input_before_the_affine_part():
    layer = normwise.RMSNorm(C, eps=1e-5, cast="input")
    x, scale = torch.randn(N, 5, C).bfloat16(), torch.randn(N, C)
    z = functional.rms_norm(x.float(), [C], None, 1e-5).bfloat16()
    y = layer(x, scale=scale)
    assert y.dtype == torch.float32
    assert torch.equal(y, layer.weight * z * (1 + scale[:, None]))


def test_segments_take_a_scale_by_row():
    x, segments = torch.randn(6, C), torch.tensor([0, 0, 1, 1, 1, 0])
    scale, shift = torch.randn(2, 6, C)
    for layer in (normwise.LayerNorm(C), normwise.InstanceNorm1d(C, affine=True), normwise.BatchNorm1d(C)):
        y = layer(x, segments=segments, scale=scale, shift=shift)
        assert_close(y, layer(x, segments=segments) * (1 + scale) + shift, kind="composed", count=6 * C)


def test_channels_last_stay_so():
    x = torch.randn(N, C, 5, 2).to(memory_format=torch.channels_last)
    scale = torch.randn(N, C)
    for layer in (normwise.BatchNorm2d(C), normwise.GroupNorm(2, C), normwise.FrozenBatchNorm2d(C)):
        y = layer(x, scale=scale, shift=scale)
        assert y.is_contiguous(memory_format=torch.channels_last)
        s = scale[..., None, None]
        assert_close(y, layer(x) * (1 + s) + s, kind="composed", count=x.numel())


@pytest.mark.parametrize("name", CASES)
def test_an_empty_batch(name):
    case, layer = CASES[name], made(name)
    y = layer(torch.zeros(0, *case.shape[1:]), scale=torch.zeros(0, *case.sample[1:]))
    assert y.shape == (0, *case.shape[1:])


ERRORS: list[tuple[str, Callable[[], Any], type[Exception], str]] = [
    ("T is not N", lambda: normwise.LayerNorm(C)(torch.randn(N, 5, C), scale=torch.randn(5, C)), ValueError,
     r"scale of shape \(5, 4\) does not fit .* expected \(3, 4\), one for each sample"),
    ("four axes", lambda: normwise.LayerNorm(C)(torch.randn(N, 2, 5, C), shift=torch.randn(N, 5, C)), ValueError,
     "shift of shape"),
    ("vector", lambda: normwise.BatchNorm1d(C)(torch.randn(N, C, 5), shift=torch.randn(C)), RuntimeError,
     r"shift.unsqueeze\(0\)"),
    ("channels", lambda: normwise.GroupNorm(2, C)(torch.randn(N, C, 5), scale=torch.randn(N, 3)), ValueError,
     r"expected \(3, 4\)"),
    ("number", lambda: normwise.BatchNorm1d(C)(torch.randn(N, C), scale=0.1), TypeError, "scale must be a tensor"),
    ("integers", lambda: normwise.BatchNorm1d(C)(torch.randn(N, C), scale=torch.ones(N, C).long()), TypeError,
     "scale must be of a floating dtype"),
    ("gate", lambda: normwise.RMSNorm(C)(torch.randn(N, C), gate=torch.randn(C)), ValueError,
     "gate must have the input's shape"),
    ("gate_act", lambda: normwise.RMSNorm(C, gate_act="tanh"), ValueError, "unknown gate_act 'tanh': expected one of"),
    ("gate_first", lambda: normwise.LayerNorm(C, gate_first="yes"), TypeError, "gate_first must be True"),
    ("packed", lambda: normwise.LayerNorm(C)(pack_sequence([torch.randn(3, C)]), scale=torch.randn(1, C)), ValueError,
     "scale of a PackedSequence or nested tensor is not supported"),
    ("packed channels", lambda: normwise.GroupNorm(2, C)(pack_sequence([torch.randn(3, C)]), shift=torch.randn(1, C)),
     ValueError, "shift of a PackedSequence or nested tensor is not supported"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "text"), [e[1:] for e in ERRORS], ids=[e[0] for e in ERRORS])
def test_refused(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_a_refused_call_moves_no_running_average():
    layer = normwise.BatchNorm1d(C)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match="scale of shape"):
        layer(torch.randn(N, C, 5), scale=torch.randn(2, C))
    for key, value in layer.state_dict().items():
        assert torch.equal(value, before[key])


def test_repr_and_old_layers():
    assert "gate_first=True, gate_act='sigmoid'" in repr(normwise.RMSNorm(C, gate_first=True, gate_act="sigmoid"))
    assert "gate" not in repr(normwise.LayerNorm(C))
    old = normwise.LayerNorm(C)
    del old.gate_first, old.gate_act  # pickled before there was a gate
    x = torch.randn(2, N, C)
    assert torch.equal(old(x[0], gate=x[1]), normwise.LayerNorm(C)(x[0], gate=x[1]))


def test_accumulated_micro_batches_are_the_whole_batch():
    """A conditional BatchNorm over micro-batches."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.table = nn.Linear(C, C), normwise.BatchNorm1d(C), nn.Embedding(3, 2 * C)

        def forward(self, x: Tensor, label: Tensor) -> Tensor:
            scale, shift = self.table(label).chunk(2, 1)
            return self.norm(self.first(x), scale=scale, shift=shift)

    whole = Net().double()
    pieces = copy.deepcopy(whole)
    x, label = torch.randn(8, C, dtype=torch.float64), torch.arange(8) % 3
    whole(x, label).cos().mean().backward()
    batches = [(x[:5], label[:5]), (x[5:], label[5:])]
    normwise.accumulated_backward(pieces, batches, lambda batch: pieces(*batch).cos().sum() / (8 * C))
    for (name, a), b in zip(pieces.named_parameters(), whole.parameters(), strict=True):
        assert_close(a.grad, b.grad, kind="composed", count=8, scale=1.0, name=name)
    assert_close(pieces.norm.running_var, whole.norm.running_var, kind="composed")
