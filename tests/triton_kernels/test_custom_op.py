"""The nodes that torch.compile and torch.export see of Triton's kernels: torch's opcheck, and compiled, exported,
autocast and data-parallel models equal to eager ones."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import normwise
import normwise.ops.custom_op.kernel_norm
from normwise.backends.protocol import LayerRequest, Layout, RecurrenceRequest
from normwise.backends.recurrence import Weights
from normwise.backends.triton import runtime
from normwise.ops import custom_op, dispatch
from normwise.ops.rnn.presets import preset
from support.backends import ran, using, without_kernels
from support.recurrences import random_weights
from support.tolerances import assert_close

T, B, INPUT, HIDDEN = 3, 3, 3, 5
LENGTHS = {"full": None, "ragged": torch.tensor([1, 3, 0])}
RECURRENCES = {
    "lstm": ("lstm", "layer", None, "full", torch.float32),
    "lstm, rms, ragged": ("lstm", "rms", None, "ragged", torch.float32),
    "gru, ragged": ("gru", "layer", "haste", "ragged", torch.float32),
    "gru, bfloat16": ("gru", "layer", None, "full", torch.bfloat16),
    "rnn": ("rnn", "layer", None, "full", torch.float64),
    "lstm without a norm": ("lstm", None, None, "ragged", torch.float32),
}


@pytest.fixture(autouse=True)
def compiled_anew() -> None:
    """For every test here."""
    torch._dynamo.reset()


def detached(arguments: list[Any]) -> list[Any]:
    return [a.detach() if isinstance(a, Tensor) else a for a in arguments]


@pytest.mark.parametrize("name", RECURRENCES)
def test_opcheck_of_recurrences(name: str) -> None:
    cell, norm, variant, lengths, dtype = RECURRENCES[name]
    config = preset(cell, norm, variant)  # type: ignore[arg-type]
    shapes = config.shapes(INPUT, HIDDEN)
    weights = Weights(**{k: w.to(dtype).requires_grad_() for k, w in random_weights(shapes).items()})
    x, h0, c0 = (torch.randn(*s, dtype=dtype, requires_grad=True) for s in ((T, B, INPUT), (B, HIDDEN), (B, HIDDEN)))
    described = [config.cell, config.norm, config.norm_placement, list(config.groups), config.cell_norm, config.eps]
    described += [config.reset_after, config.update_gate, config.update_offset, config.nonlinearity, "triton"]
    args = [x, h0, c0 if cell == "lstm" else None, *weights, LENGTHS[lengths], torch.rand(T, B) < 0.3, True, *described]
    torch.library.opcheck(torch.ops.normwise.recurrence.default, [*args, True])
    torch.library.opcheck(torch.ops.normwise.recurrence.default, [*detached(args), False])
    output, _, c, *kept = torch.ops.normwise.recurrence(*detached(args), True)
    grads = torch.randn_like(output), None, torch.randn_like(c) if cell == "lstm" else None
    needs = [True] * (3 + len(Weights._fields))
    call = [*grads, *detached(args), [output, *kept], needs]
    torch.library.opcheck(torch.ops.normwise.recurrence_backward.default, call)
    found = torch.ops.normwise.recurrence_backward(*call)
    addresses = [g.data_ptr() for g in found if g.numel()]
    assert len(set(addresses)) == len(addresses)  # outputs of an op share no memory


# Config, masked, with a residual, training (running averages are to be moved), channels last.
NORMS: dict[str, tuple[dict[str, Any], bool, bool, bool, bool]] = {
    "features": ({"family": "features", "act": "gelu"}, False, False, False, False),
    "features, added": ({"family": "features", "center": False}, True, True, False, False),
    "groups": ({"family": "groups", "groups": 2, "act": "silu"}, False, True, False, True),
    "groups, averages": ({"family": "groups", "groups": 4}, True, False, True, False),
    "channels": ({"family": "channels", "act": "relu"}, True, True, True, False),
    "channels last": ({"family": "channels"}, False, True, True, True),
    "channels, given": ({"family": "channels", "batch_statistics": False}, False, False, False, False),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_opcheck_of_norms(name: str, dtype: torch.dtype) -> None:
    options, masked, with_residual, update, last = NORMS[name]
    config: dict[str, Any] = {"op": name, "family": "", "eps": 1e-3, "act": None, "axes": 1, "groups": 1}
    described = [*(config | {"center": True, "batch_statistics": True} | options).values(), "triton"]
    x, residual = (torch.randn(2, 4, 3, 5, dtype=dtype) for _ in range(2))
    if last:
        x = x.to(memory_format=torch.channels_last)
    x.requires_grad_()
    size = 5 if options["family"] == "features" else 4
    weight, bias = (torch.randn(size, dtype=dtype, requires_grad=True) for _ in range(2))
    mask = (torch.rand(2, 1, 3, 1 if size == 5 else 5) < 0.7) if masked else None
    mean, var = (None, None) if options.get("batch_statistics", True) else (torch.randn(4), torch.rand(4) + 0.5)
    after = residual.requires_grad_() if with_residual else None
    args = [x, after, weight, bias, mask, mean, var, *described]
    torch.library.opcheck(torch.ops.normwise.kernel_norm.default, [*args, update, True])
    torch.library.opcheck(torch.ops.normwise.kernel_norm.default, [*detached(args), update, False])
    y, total, stats, _ = torch.ops.normwise.kernel_norm(*detached(args), update, True)
    if not total.numel():
        total, after = x, after if options.get("act") else None
        dtotal = None
    else:
        after, dtotal = None, torch.randn_like(total)
    call = [total.detach(), after, weight, bias, mask, stats, torch.randn_like(y), dtotal, *described]
    torch.library.opcheck(torch.ops.normwise.kernel_norm_backward.default, detached(call))


@pytest.mark.parametrize("name", ["features, added", "groups", "channels", "channels, given"])
def test_second_derivatives_of_the_node_are_the_references(name: str) -> None:
    options, masked, with_residual, _, _ = NORMS[name]
    config: dict[str, Any] = {"op": name, "family": "", "eps": 1e-3, "act": None, "axes": 1, "groups": 1}
    described = [*(config | {"center": True, "batch_statistics": True} | options).values(), "triton"]
    x, residual = (torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    size = 3 if options["family"] == "features" else 4
    weight, bias = (torch.randn(size, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mask = (torch.rand(2, 1, 1 if size == 3 else 3) < 0.7) if masked else None
    given = (None, None)
    if not options.get("batch_statistics", True):
        given = torch.randn(4, dtype=torch.float64), torch.rand(4, dtype=torch.float64) + 0.5

    def call(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        after = residual if with_residual else None
        y, total, *_ = torch.ops.normwise.kernel_norm(x, after, weight, bias, mask, *given, *described, False, True)
        return (y, total) if total.numel() else (y,)

    leaves = (x, weight, bias, residual) if with_residual else (x, weight, bias)
    rest = () if with_residual else (residual,)
    assert torch.autograd.gradcheck(lambda *t: call(*t, *rest), leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda *t: call(*t, *rest), leaves, fast_mode=True)


class Model(nn.Module):
    """Norms of all families around a recurrent layer: (T, B, INPUT) and the lengths of the B sequences."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.before = normwise.LayerNorm(INPUT, act="gelu")
        self.batch = normwise.BatchNorm1d(INPUT)
        self.recurrent = getattr(normwise, kind)(INPUT, HIDDEN, bidirectional=True)
        self.groups = normwise.GroupNorm(2, 2 * HIDDEN)
        self.rms = normwise.RMSNorm(2 * HIDDEN)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        x = self.before(x)
        x = self.batch(x.permute(1, 2, 0), lengths=lengths, residual=x.permute(1, 2, 0)).permute(2, 0, 1)
        y, _ = self.recurrent(x, lengths=lengths)
        y, total = self.rms(y, add=y.sin())
        return self.groups((y + total).permute(1, 2, 0))  # type: ignore[no-any-return]


# Four norms, and a recurrent layer in two directions.
EXPECTED_NODES = ["normwise.kernel_norm"] * 4 + ["normwise.recurrence"] * 2


def outcome(model: Callable[..., Tensor], module: nn.Module, *call: Any) -> list[Tensor]:
    """Output, gradients and buffers."""
    x, *rest = call
    leaf = x.clone().requires_grad_()
    y = model(leaf, *rest)
    upstream = torch.linspace(-1, 1, y.numel()).view_as(y)
    gradients = torch.autograd.grad(y, [leaf, *module.parameters()], upstream.to(y.dtype))
    return [y.detach(), *gradients, *(b.clone() for b in module.buffers())]


def nodes(graphs: list[torch.fx.GraphModule]) -> list[str]:
    """The names of our nodes."""
    found = [str(n.target) for g in graphs for n in g.graph.nodes]
    return [name.removesuffix(".default") for name in found if name.startswith("normwise.")]


@pytest.mark.parametrize(
    ("kind", "backend", "lengths"),
    [("LSTM", "aot_eager", "ragged"), ("GRU", "aot_eager", "full"), ("RNN", "aot_eager", "ragged")]
    + [("LSTM", "inductor", "ragged")],
)
def test_a_compiled_model_is_as_the_eager_one(kind: str, backend: str, lengths: str) -> None:
    model = Model(kind)
    twin = copy.deepcopy(model)
    counter = CompileCounterWithBackend(backend)
    call = torch.randn(T, B, INPUT), LENGTHS[lengths]
    with using("triton"):
        found = outcome(torch.compile(model, fullgraph=True, backend=counter), model, *call)
        expected = outcome(twin, twin, *call)
    for n, (got, truth) in enumerate(zip(found, expected, strict=True)):
        if backend == "aot_eager" or not truth.is_floating_point():
            assert torch.equal(got, truth), n
        else:
            assert_close(got, truth, kind="composed", name=f"tensor {n}")
    assert sorted(nodes(counter.graphs)) == EXPECTED_NODES


def test_steps_and_batch_may_differ_without_compiling_again() -> None:
    model = Model("GRU").eval()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=True)
    with using("triton"):
        for steps, batch in ((4, 6), (2, 7), (5, 2)):
            lengths = torch.arange(batch) % steps + 1
            call = torch.randn(steps, batch, INPUT), lengths
            for got, truth in zip(outcome(compiled, model, *call), outcome(model, model, *call), strict=True):
                assert torch.equal(got, truth)
    assert len([g for g in counter.graphs if nodes([g])]) == 1


@pytest.mark.parametrize("dynamic", [False, True])
def test_an_exported_model_runs_the_kernels(dynamic: bool) -> None:
    model, x, lengths = Model("LSTM").eval(), torch.randn(T, B, INPUT), torch.tensor([1, 3, 2])
    batch = torch.export.Dim("batch", min=2, max=64)
    shapes = {"x": {0: torch.export.Dim("steps", min=2, max=64), 1: batch}, "lengths": {0: batch}} if dynamic else None
    with normwise.backend("triton"):
        program = torch.export.export(model, (x, lengths), dynamic_shapes=shapes)
    found = nodes([program.graph_module])
    assert sorted(found) == EXPECTED_NODES
    with ran() as seen:  # nobody forces it any more: the program states it
        output = program.module()(x, lengths)
        if dynamic:
            program.module()(torch.randn(5, 2, INPUT), torch.tensor([5, 1]))
    assert seen == {"triton"}
    with normwise.backend("triton"):
        assert torch.equal(output, model(x, lengths))


def test_a_program_says_where_its_backend_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = normwise.LayerNorm(4).eval(), torch.randn(2, 4)
    with normwise.backend("triton"):
        program = torch.export.export(layer, (x,))
    gone = dispatch.BACKENDS["triton"]._replace(missing=lambda: "Triton is not installed")
    monkeypatch.setitem(dispatch.BACKENDS, "triton", gone)
    with pytest.raises(normwise.BackendError, match=r"for normwise's backend 'triton', .*: Triton is not installed"):
        program.module()(x)


def test_without_triton_a_forced_one_raises_and_a_free_choice_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "missing", lambda: "Triton is not installed")
    layer, x = normwise.LSTM(INPUT, HIDDEN), torch.randn(2, B, INPUT)
    with without_kernels():
        with normwise.backend("triton"), pytest.raises(Exception, match="Triton is not installed"):
            torch.compile(layer, fullgraph=True, backend="eager")(x)
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        found = torch.compile(layer, fullgraph=True, backend=counter)(x)[0]
        assert_close(found, layer(x)[0], kind="composed")
    assert nodes(counter.graphs) == []


def test_without_being_forced_norms_are_left_to_the_compiler() -> None:
    """Here, where the C++ kernels are not, the eager call would be Triton's."""
    layer, x, mask = normwise.BatchNorm1d(4), torch.randn(3, 4, 5), torch.rand(3, 5) < 0.7
    counter = CompileCounterWithBackend("aot_eager")
    with without_kernels(), ran() as seen:
        torch.compile(layer, fullgraph=True, backend=counter)(x, mask=mask)
    assert "triton" not in seen
    assert "normwise.kernel_norm" not in nodes(counter.graphs)


@pytest.mark.parametrize(("lengths", "expected"), [("none", "triton"), ("cpu", "triton"), ("cuda", "aten")])
def test_on_a_gpu_a_recurrent_layer_is_a_node_unforced(lengths: str, expected: str) -> None:
    """By fake tensors of a GPU. Lengths that were given on the CPU are read there; those that only the GPU knows leave
    the layer to the compiler."""
    config = preset("lstm", "layer")
    missing, compiling = (
        mock.patch.object(runtime, "missing", return_value=None),
        mock.patch.object(dispatch, "_is_compiling", return_value=True),
    )
    with FakeTensorMode(), missing, compiling:
        fake = {name: torch.empty(s, device="cuda") for name, s in config.shapes(INPUT, HIDDEN).items()}
        x, state = torch.empty(T, B, INPUT, device="cuda"), torch.empty(1, B, HIDDEN, device="cuda")
        known = torch.empty(B, dtype=torch.int64, device="cpu") if lengths == "cpu" else None
        on_gpu = None if lengths == "none" else torch.empty(B, dtype=torch.int64, device="cuda")
        layout = Layout(T, B, lengths=on_gpu, visible=False, lengths_on_cpu=known)
        request = RecurrenceRequest(config, x, state, state, (Weights(**fake),), layout)
        assert dispatch.resolve(request, "recurrence").backend.name == expected
        flat = state.view(B, HIDDEN)
        of_layer = LayerRequest(config, x, flat, flat, request.weights[0], layout)
        found = custom_op.recurrence("triton", of_layer, False)
        assert [t.device.type for t in found[:3] if t is not None] == ["cuda"] * 3


def test_autocast_in_a_compiled_model() -> None:
    layer = normwise.LSTM(INPUT, HIDDEN)

    def call(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return layer(x)[0]  # type: ignore[no-any-return]

    x = torch.randn(T, B, INPUT)
    with using("triton"):
        found = outcome(torch.compile(call, fullgraph=True, backend="aot_eager"), layer, x)
        expected = outcome(call, layer, x)
    assert found[0].dtype == torch.bfloat16
    for got, truth in zip(found, expected, strict=True):
        assert got.dtype == truth.dtype
        assert torch.equal(got, truth)


def test_data_parallel(tmp_path: Path) -> None:
    model = Model("RNN")
    twin = copy.deepcopy(model)
    call = torch.randn(T, B, INPUT), LENGTHS["full"]
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        parallel = torch.compile(nn.parallel.DistributedDataParallel(model), backend="aot_eager")
        with using("triton"):
            for net in (parallel, twin):
                y = net(*call)
                y.backward(torch.linspace(-1, 1, y.numel()).view_as(y))
    finally:
        dist.destroy_process_group()
    for (name, got), truth in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert got.grad is not None
        assert truth.grad is not None
        assert torch.equal(got.grad, truth.grad), name


def test_inside_functional_transforms_they_refuse_and_the_reference_runs_in_their_place() -> None:
    layer, x = normwise.LSTM(INPUT, HIDDEN), torch.randn(2, T, B, INPUT)

    def call(x: Tensor) -> Tensor:
        return layer(x)[0]  # type: ignore[no-any-return]

    with normwise.backend("triton"), pytest.raises(normwise.BackendError, match=r"torch\.func"):
        torch.vmap(call)(x)
    with ran() as seen:
        torch.vmap(call)(x)
    assert "triton" not in seen
