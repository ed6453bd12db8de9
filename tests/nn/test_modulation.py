"""scale=, shift= and gate= in the call: adaptive and gated norms equal their plain formulas."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils.rnn import pack_sequence

import normwise
from normwise import functional
from normwise.backends.cpu import library
from support.backends import using
from support.tolerances import assert_close

N, C = 3, 4
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


class Case(NamedTuple):
    make: Callable[..., nn.Module]
    shape: tuple[int, ...]
    sample: tuple[int, ...]  # of a scale by sample
    placed: tuple[int, ...]  # the same with as many axes as the input


def channels(make: Callable[..., nn.Module], *positions: int) -> Case:
    return Case(make, (N, C, *positions), (N, C), (N, C, *(1,) * len(positions)))


CASES = {
    "layer": Case(lambda: normwise.LayerNorm(C), (N, 5, C), (N, C), (N, 1, C)),
    "layer of rows": Case(lambda: normwise.LayerNorm(C), (N, C), (N, C), (N, C)),
    "layer of two axes": Case(lambda: normwise.LayerNorm((5, C)), (N, 2, 5, C), (N, 5, C), (N, 1, 5, C)),
    "layer, dim=1": Case(lambda: normwise.LayerNorm(C, dim=1), (N, C, 5, 2), (N, C), (N, C, 1, 1)),
    "layer, offset": Case(lambda: normwise.LayerNorm(C, offset=1.0, act="gelu"), (N, 5, C), (N, C), (N, 1, C)),
    "rms": Case(lambda: normwise.RMSNorm(C, eps=1e-5), (N, 5, C), (N, C), (N, 1, C)),
    "group": channels(lambda: normwise.GroupNorm(2, C, act="silu"), 5, 2),
    "group of channels": channels(lambda: normwise.GroupNorm(C, C), 5),
    "group, no bias": channels(lambda: normwise.GroupNorm(2, C, bias=False), 7),
    "instance1d": channels(lambda: normwise.InstanceNorm1d(C), 7),
    "instance2d": channels(lambda: normwise.InstanceNorm2d(C, affine=True, track_running_stats=True), 5, 2),
    "instance3d": channels(lambda: normwise.InstanceNorm3d(C, affine=True), 2, 2, 3),
    "batch1d": channels(lambda: normwise.BatchNorm1d(C, act="relu")),
    "batch2d": channels(lambda: normwise.BatchNorm2d(C), 5, 2),
    "batch3d": channels(lambda: normwise.BatchNorm3d(C, affine=False), 2, 2, 3),
    "ghost": channels(lambda: normwise.BatchNorm1d(C, virtual_batch_size=2), 7),
    "sync": channels(lambda: normwise.SyncBatchNorm(C), 7),
    "renorm": channels(lambda: normwise.BatchRenorm2d(C, r_max=2, d_max=1), 5, 2),
    "frozen": channels(lambda: normwise.FrozenBatchNorm2d(C), 5, 2),
}
each_case = pytest.mark.parametrize("name", CASES)
each_mode = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def made(name: str, dtype: torch.dtype = torch.float32, training: bool = True) -> nn.Module:
    layer = CASES[name].make()
    for t in (*layer.parameters(), *layer.buffers()):
        if t.is_floating_point():
            nn.init.uniform_(t, 0.5, 1.5)
    return layer.to(dtype).train(training)


def in_float64(layer: nn.Module, x: Tensor, scale: Tensor | None, shift: Tensor | None, **given: Any) -> Tensor:
    """The formula, written behind the layer itself without its activation."""
    layer = copy.deepcopy(layer).double()
    act, layer.act = layer.act, None
    y = layer(x, **given)
    y = y if scale is None else y * (1 + scale)
    y = y if shift is None else y + shift
    return y if act is None else getattr(F, act)(y)


def leaves(*tensors: Tensor, dtype: torch.dtype) -> list[Tensor]:
    return [t.to(dtype).detach().requires_grad_() for t in tensors]


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


@pytest.mark.parametrize("first", [True, False], ids=["gate first", "norm first"])
@pytest.mark.parametrize("act", ["silu", "sigmoid", None])
@pytest.mark.parametrize("make", [normwise.RMSNorm, normwise.LayerNorm])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gate(make, first, act, dtype):
    layer = make(C, eps=1e-5, gate_first=first, gate_act=act)
    nn.init.uniform_(layer.weight, 0.5, 1.5)
    layer = layer.to(dtype)
    x, gate, add = leaves(*torch.randn(3, N, 5, C, dtype=torch.float64), dtype=dtype)
    truth = leaves(x, gate, dtype=torch.float64)
    opened = truth[1] if act is None else getattr(F, act)(truth[1])
    plain = copy.deepcopy(layer).double()
    expected = plain(truth[0] * opened) if first else plain(truth[0]) * opened
    y = layer(x, gate=gate)
    assert y.dtype == dtype
    kind = "forward" if dtype == torch.bfloat16 else "composed"
    assert_close(y, expected, kind=kind, count=C, scale=float(expected.detach().abs().max()) * 4)
    upstream = torch.randn_like(x)
    for a, b in zip(
        torch.autograd.grad(y, (x, gate), upstream),
        torch.autograd.grad(expected, truth, upstream.double()),
        strict=True,
    ):
        assert_close(a, b, kind="grad" if dtype == torch.bfloat16 else "composed", count=C * 8)
    if dtype == torch.float64:
        total = x + add
        both = layer(x, add=add, gate=gate)
        assert_close(both[0], layer(total, gate=gate), kind="composed")
        assert torch.equal(both[1], total)


@pytest.mark.parametrize("first", [True, False])
def test_a_gate_in_padding_is_not_seen(first):
    layer = normwise.RMSNorm(C, eps=1e-5, gate_first=first, dtype=torch.float64)
    x, gate = torch.randn(2, N, 5, C, dtype=torch.float64)
    mask = torch.rand(N, 5) < 0.6
    spoilt = leaves(*(t.masked_fill(~mask[..., None], torch.nan) for t in (x, gate)), dtype=torch.float64)
    y = layer(spoilt[0], gate=spoilt[1], mask=mask)
    expected = layer(x, gate=gate) * mask[..., None]
    assert_close(y, expected, kind="composed")
    for g in torch.autograd.grad(y.square().sum(), spoilt):
        assert not g[~mask].any()
        assert g[mask].all()


def modulated(kind: str, dtype: torch.dtype) -> tuple[nn.Module, dict[str, Tensor], dict[str, Any]]:
    """A layer, the tensors of a call and its options."""
    first = kind == "gate first"
    layer = normwise.RMSNorm(21, eps=1e-5, gate_first=first) if "gate" in kind else normwise.LayerNorm(21, act="silu")
    for p in layer.parameters():
        nn.init.uniform_(p, 0.5, 1.5)
    x = torch.randn(N, 9, 21)
    mask = torch.rand(N, 9) < 0.7
    shape = (N, 9, 21) if "position" in kind else (N, 1, 21)
    given = {"scale": torch.randn(shape), "shift": torch.randn(shape)}
    given |= {"gate": torch.randn_like(x)} if "gate" in kind else {}
    if kind == "shift":
        del given["scale"]
    tensors = {"input": x, "add": torch.randn_like(x), **given}
    return layer.to(dtype), {k: t.to(dtype).requires_grad_() for k, t in tensors.items()}, {"mask": mask}


KINDS = ["sample", "position", "shift", "gate first", "gate last", "gate by position"]


@pytest.mark.parametrize("backend", ["cpu", "chosen", "no kernels", "aten", "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_backend_equals_the_reference_in_float64(kind, backend):
    layer, tensors, options = modulated(kind, torch.float32)
    exact, truth = copy.deepcopy(layer).double(), {k: leaves(t, dtype=torch.float64)[0] for k, t in tensors.items()}
    upstream = torch.randn(2, *tensors["input"].shape)
    with using(backend):
        outputs = layer(**tensors, **options)
        found = torch.autograd.grad(outputs, [*tensors.values(), *layer.parameters()], list(upstream))
    with normwise.backend("reference"):
        expected = exact(**truth, **options)
        true = torch.autograd.grad(expected, [*truth.values(), *exact.parameters()], list(upstream.double()))
    for a, b in zip((*outputs, *found), (*expected, *true), strict=True):
        assert_close(a, b, kind="composed", count=a.numel(), scale=float(b.detach().abs().max()))


@pytest.mark.skipif(library.missing() is not None, reason=str(library.missing()))
@pytest.mark.parametrize("kind", KINDS)
def test_one_kernel_does_all(kind):
    layer, tensors, options = modulated(kind, torch.bfloat16)
    name = "GatedNormBackward" if "gate" in kind else "NormBackward"
    assert type(layer(**tensors, **options)[0].grad_fn).__name__ == name
    assert type(layer(**{**tensors, "input": tensors["input"].float()}, **options)[0].grad_fn).__name__ != name
    with normwise.backend("reference"):
        assert type(layer(**tensors, **options)[0].grad_fn).__name__ != name


@pytest.mark.skipif(library.missing() is not None, reason=str(library.missing()))
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(6, 5, 4, 3), (9, 5)], ids=str)
@pytest.mark.parametrize("which", ["both", "scale", "shift", "one scale for all channels", "one shift for all samples"])
def test_one_kernel_does_a_conditional_batch_norm(training, shape, which):
    layer = getattr(normwise, f"BatchNorm{len(shape) - 2 or 1}d")(5, act="relu").train(training)
    x, residual = torch.randn(2, *shape).unbind()
    ones = (1,) * (len(shape) - 2)
    given = {"scale": torch.randn(shape[0], 1 if "channels" in which else 5, *ones), "shift": torch.randn(*shape[:2])}
    if "samples" in which:
        given["shift"] = torch.randn(1, 5, *ones)
    given = {k: t for k, t in given.items() if which not in ("scale", "shift") or k == which}
    tensors = {"input": x, "residual": residual, **given}
    truth = {k: leaves(t, dtype=torch.float64)[0] for k, t in tensors.items()}
    tensors = {k: t.requires_grad_() for k, t in tensors.items()}
    mask = torch.rand(shape[0], *shape[2:]) < 0.7
    mask.view(-1)[:2] = True
    exact, upstream = copy.deepcopy(layer).double(), torch.randn(shape)
    with using("cpu"):
        y = layer(**tensors, mask=mask)
        assert type(y.grad_fn).__name__ == "NormBackward"
        found = torch.autograd.grad(y, [*tensors.values(), *layer.parameters()], upstream)
    with normwise.backend("reference"):
        expected = exact(**truth, mask=mask)
        true = torch.autograd.grad(expected, [*truth.values(), *exact.parameters()], upstream.double())
    for a, b in zip((y, *found), (expected, *true), strict=True):
        assert_close(a, b, kind="composed", count=x.numel(), scale=float(b.detach().abs().max()))
    for name in ("running_mean", "running_var"):
        assert_close(getattr(layer, name), getattr(exact, name), kind="composed", count=x.numel(), scale=1.0)
    assert layer.num_batches_tracked == exact.num_batches_tracked == training


@pytest.mark.skipif(library.missing() is not None, reason=str(library.missing()))
def test_a_scale_by_position_or_a_statistic_from_elsewhere_takes_no_kernel_for_all():
    x = torch.randn(8, 5, 4, 3, requires_grad=True)
    by_sample, by_position = torch.randn(8, 5), torch.randn(8, 5, 4, 3)
    for layer, scale in [
        (normwise.BatchNorm2d(5), by_position),
        (normwise.BatchNorm2d(5, virtual_batch_size=4), by_sample),
        (normwise.BatchNorm2d(5, correction=0), by_sample),
        (normwise.BatchNorm2d(5, momentum=None), by_sample),
    ]:
        y = layer(x, scale=scale)
        one_kernel = type(y.grad_fn).__name__ == "NormBackward"
        assert one_kernel == (layer.momentum is None)  # the weight of a cumulative average is a number on the CPU
        expected = in_float64(layer, x.double(), scale.double().view(*scale.shape, *(1,) * (4 - scale.dim())), None)
        if layer.virtual_batch_size is None:
            assert_close(y, expected, kind="composed", count=x.numel(), scale=float(expected.detach().abs().max()))
        assert layer.num_batches_tracked == 1


@pytest.mark.parametrize("first", [True, False])
def test_second_derivatives_of_a_gate_with_a_mask_and_a_sum(first):
    layer = normwise.LayerNorm(C, gate_first=first, act="silu" if first else None, dtype=torch.float64)
    given = leaves(*torch.randn(3, 2, 3, C, dtype=torch.float64), dtype=torch.float64)
    mask = torch.tensor([[True, True, False], [True, True, True]])

    def call(x: Tensor, add: Tensor, gate: Tensor) -> Any:
        return layer(x, add=add, gate=gate, mask=mask)

    assert gradcheck(call, given, fast_mode=True, check_batched_grad=True)
    assert gradgradcheck(call, given, fast_mode=True)


def test_a_gate_changed_in_place_before_the_backward_is_noticed():
    x, gate = torch.randn(2, N, 5, C)
    y = normwise.RMSNorm(C)(x, gate=gate.requires_grad_())
    with torch.no_grad():
        gate.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_one_tensor_as_input_and_gate_gets_both_gradients():
    layer = normwise.RMSNorm(C, eps=1e-5, dtype=torch.float64)
    x = torch.randn(N, 5, C, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: layer(x, gate=x), x)
    assert gradgradcheck(lambda x: layer(x, gate=x), x)


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


@pytest.mark.parametrize("backend", ["reference", "aten", "cpu"])
@pytest.mark.parametrize("name", ["layer", "rms", "group", "instance3d", "batch2d", "frozen"])
def test_on_every_backend(name, backend):
    case, layer = CASES[name], made(name)
    x, scale, shift = (torch.randn(shape) for shape in (case.shape, case.sample, case.sample))
    expected = in_float64(layer, x.double(), *(t.double().reshape(case.placed) for t in (scale, shift)))
    with using(backend):
        y = layer(x, scale=scale, shift=shift)
    assert_close(y, expected, kind="composed", count=x.numel())
