"""What calls cost on a GPU, counted without one: launches beside torch.nn's, and no wait for the host."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.testing._internal.distributed.fake_pg import FakeStore

import normwise
from normwise.ops import distributed
from support.launches import (
    CALLS,
    TORCHS,
    C,
    L,
    Launches,
    N,
    as_on_gpu,
    check_skipped,
    check_values,
    counted,
    counted_of_torch,
    forward_and_backward,
    input_of,
    meta_as_gpu,
    some_mask,
)
from support.tolerances import assert_close

# Launches forward and backward, no more than these, of what torch.nn has not. docs/gpu-launches.md has the table, and
# tests/triton_kernels/test_launches.py what they are with Triton.
LIMITS = {
    "batch, mask": (33, 14),
    "batch, mask, evaluation": (4, 3),
    "batch, lengths": (35, 14),
    "group, mask": (20, 20),
    "instance, mask": (20, 20),
    "ghost batches": (45, 6),
    "ghost batches, mask": (73, 19),
    "renorm": (34, 5),
}
# Launches more than torch.nn's forward has: the guard of running averages, in torch's operations.
MORE = {"batch": 5, "batch, 2d": 5, "batch, act and residual": 5, "batch, momentum None": 8, "sync, one rank": 5}


@pytest.mark.parametrize("call", LIMITS)
def test_a_call_takes_no_more_launches_than_its_limit(call: str) -> None:
    forward, backward = counted(call)
    assert forward.count <= LIMITS[call][0], forward.names
    assert backward.count <= LIMITS[call][1], backward.names


@pytest.mark.parametrize("call", TORCHS)
def test_a_norm_that_torch_has_takes_no_more_launches_than_torchs_and_its_guard(call: str) -> None:
    ours, torchs = counted(call), counted_of_torch(call)
    assert ours[0].count <= torchs[0].count + MORE.get(call, 0), (ours[0].names, torchs[0].names)
    assert ours[1].count <= torchs[1].count, (ours[1].names, torchs[1].names)


@pytest.mark.parametrize("call", CALLS)
def test_no_usual_call_waits_for_the_host(call: str) -> None:
    forward, backward = counted(call)
    assert forward.count > 0
    assert forward.waits + backward.waits == {}


@pytest.mark.parametrize("masked", [False, True])
def test_batch_norm_over_ranks_waits_in_its_first_call_alone(masked: bool) -> None:
    """Ranks that answer with anything, since no value may matter."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        layer = normwise.SyncBatchNorm(C)
        given = {"mask": some_mask()} if masked else {}
        x = torch.randn(N, C, L, requires_grad=True)
        with as_on_gpu(), mock.patch.object(distributed, "require_agreement") as first:
            forward, backward = forward_and_backward(lambda: layer(x, **given))
        assert first.call_count == 1
        assert forward.waits + backward.waits == {}
    finally:
        dist.destroy_process_group()


def test_a_wait_is_seen() -> None:
    """Otherwise the tests above would see nothing."""
    for wait in (
        lambda: torch.ones(2).sum().item(),
        lambda: bool(torch.ones(2).all()),
        lambda: torch.ones(3)[torch.ones(3) > 0],
        lambda: torch.ones(3).nonzero(),
    ):
        with Launches() as found:
            wait()
        assert found.waits, wait


@pytest.mark.parametrize("call", CALLS)
def test_what_a_gpu_would_compute_is_what_the_cpu_does(call: str) -> None:
    """The branches for a GPU by other operations: outputs, gradients and running averages agree."""
    check_values(call)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_batch_that_is_not_finite_moves_nothing_and_is_counted(masked: bool, momentum: float | None) -> None:
    check_skipped(masked, momentum, 200)  # more than are kept to be counted together


def test_masked_values_far_from_zero_keep_their_digits() -> None:
    x, mask = torch.randn(N, C, L) + 1e4, some_mask()
    layer = normwise.BatchNorm1d(C)
    with as_on_gpu():
        y = layer(x, mask=mask)
    exact = normwise.BatchNorm1d(C).double()(x.double(), mask=mask)
    assert_close(y, exact.float(), kind="forward", count=N * L, scale=1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("call", ["batch, mask", "group, mask", "instance, mask", "batch, mask, evaluation"])
def test_masked_norms_of_other_dtypes_on_a_gpu(call: str, dtype: torch.dtype) -> None:
    """A layer of float32 under half precision, as autocast has it, and one of float64."""
    make, arguments = CALLS[call]
    layer, given = make(), arguments()
    x = torch.randn(N, C, L).to(dtype).requires_grad_()
    truth = x.detach().double().requires_grad_()
    if dtype is torch.float64:
        layer.double()
    exact, grad = copy.deepcopy(layer).double(), torch.randn(N, C, L).to(dtype)
    with normwise.backend("reference"):
        exact(truth, **given).backward(grad.double())
        expected = exact(truth, **given)
    with as_on_gpu():
        y = layer(x, **given)
        y.backward(grad)
    assert y.dtype == dtype
    assert x.grad is not None
    assert truth.grad is not None
    assert_close(y, expected, kind="composed", count=N * L)
    assert_close(x.grad, truth.grad, kind="composed", count=N * L)


def test_what_a_gpu_does_where_the_cpu_raises() -> None:
    layer, empty = normwise.BatchNorm1d(C), torch.zeros(N, L, dtype=torch.bool)
    one = empty.clone()
    one[2, 3] = True
    before = [b.clone() for b in layer.buffers()]
    with as_on_gpu(), torch.no_grad():
        assert not layer(torch.randn(N, C, L), mask=empty).any()
        assert torch.equal(layer.running_mean, before[0])
        assert torch.equal(layer.running_var, before[1])
        assert not layer(torch.randn(N, C, L), mask=one).any()  # the bias
        assert not torch.equal(layer.running_mean, before[0])
        assert torch.equal(layer.running_var, before[1])
        longer = layer(torch.ones(N, C, L), lengths=torch.full((N,), L + 1))
        assert longer.shape == (N, C, L)
    for mask in (empty, one):
        with pytest.raises(ValueError, match=r"no valid element|more than 1 value"):
            layer(torch.randn(N, C, L), mask=mask)


def test_padding_may_hold_anything_on_a_gpu() -> None:
    mask = some_mask()
    x = torch.randn(N, C, L).masked_fill(~mask[:, None], float("nan")).requires_grad_()
    with as_on_gpu():
        for layer in (normwise.BatchNorm1d(C), normwise.GroupNorm(4, C), normwise.BatchNorm1d(C).eval()):
            x.grad = None
            y = layer(x, mask=mask)
            y.backward(torch.randn(N, C, L))
            assert x.grad is not None
            assert y.isfinite().all()
            assert x.grad.isfinite().all()
            assert not y[~mask[:, None].expand_as(y)].any()
            assert not x.grad[~mask[:, None].expand_as(y)].any()


@pytest.mark.parametrize("kind", [normwise.BatchNorm1d, lambda c: normwise.GroupNorm(4, c)])
def test_second_derivatives_of_masked_norms_on_a_gpu(kind: Callable[[int], nn.Module]) -> None:
    layer, mask = kind(4).double(), some_mask()
    x = torch.randn(N, 4, L, dtype=torch.float64, requires_grad=True)
    with as_on_gpu():
        assert torch.autograd.gradgradcheck(lambda x: layer(x, mask=mask), x, nondet_tol=0.0)


RECURRENT = [normwise.LSTM, normwise.GRU, normwise.RNN]


def recurrence(cell: Any, norm: str | None, **options: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    """A layer in two directions, and what its call takes."""
    reset = torch.rand(6, 3) > 0.7
    given = {"lengths": torch.tensor([6, 2, 0]), "reset": reset}
    return cell(4, 5, 2, norm=norm, bidirectional=True, **options), given


@pytest.mark.parametrize("given", [("reset",), ("lengths", "reset")])
@pytest.mark.parametrize("norm", ["layer", "batch"])
@pytest.mark.parametrize("cell", RECURRENT)
def test_recurrent_layers_do_not_wait_for_what_a_gpu_holds(cell: Any, norm: str, given: tuple[str, ...]) -> None:
    layer, arguments = recurrence(cell, norm)
    arguments = {name: arguments[name] for name in given}
    x = torch.randn(6, 3, 4, requires_grad=True)
    forward, backward = forward_and_backward(lambda: layer(x, **arguments)[0])
    assert forward.waits + backward.waits == {}


@pytest.mark.parametrize("given", [("lengths",), ("reset",), ("lengths", "reset")])
@pytest.mark.parametrize(("norm", "zoneout"), [("layer", 0.1), ("batch", 0.0)])
@pytest.mark.parametrize("cell", [*RECURRENT, partial(normwise.RNN, nonlinearity="relu")])
def test_what_a_gpu_would_compute_of_sequences_is_what_the_cpu_does(
    cell: Any, norm: str, zoneout: float, given: tuple[str, ...]
) -> None:
    layer, arguments = recurrence(cell, norm, zoneout=zoneout)
    arguments = {name: arguments[name] for name in given}
    layer.eval()  # zoneout draws in training
    x, grad = torch.randn(6, 3, 4), torch.randn(6, 3, 10)
    if "lengths" in given:
        x = x.masked_fill(torch.arange(6)[:, None, None] >= arguments["lengths"][:, None], float("nan"))

    def run() -> list[Tensor]:
        at = x.clone().requires_grad_()
        layer.zero_grad()
        y, state = layer(at, **arguments)
        y.backward(grad)
        finals = state if isinstance(state, tuple) else (state,)
        return [y, *finals, at.grad, *[p.grad for p in layer.parameters()]]  # type: ignore[list-item]

    with normwise.backend("reference"):
        expected = run()
    with as_on_gpu():
        found = run()
    for ours, truth in zip(found, expected, strict=True):
        assert_close(ours, truth, kind="composed", count=18, scale=float(truth.detach().abs().max()) + 1)


@pytest.mark.parametrize(
    ("cell", "limits"), [(normwise.LSTM, (12, 25)), (normwise.GRU, (9, 27)), (normwise.RNN, (4, 8))]
)
@pytest.mark.parametrize("lengths", [None, torch.tensor([6, 2, 4])])
def test_a_step_takes_no_more_launches_than_its_limit(
    cell: Any, limits: tuple[int, int], lengths: Tensor | None
) -> None:
    """Lengths that a GPU holds cost none."""
    layer = cell(4, 5, norm="layer")

    def launches_of(steps: int) -> list[int]:
        x = torch.randn(steps, 3, 4, requires_grad=True)
        return [found.count for found in forward_and_backward(lambda: layer(x, lengths=lengths)[0])]

    step = [more - less for more, less in zip(launches_of(9), launches_of(8), strict=True)]
    assert step[0] <= limits[0]
    assert step[1] <= limits[1]


def on_meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=dtype.is_floating_point)


def packed_on_meta(features: int) -> PackedSequence:
    """A PackedSequence has the numbers of its rows on the CPU."""
    order = on_meta(3, dtype=torch.int64)
    return PackedSequence(on_meta(9, features), torch.tensor([3, 3, 2, 1]), order, order)


def jagged_on_meta(features: int) -> Tensor:
    return torch.nested.nested_tensor_from_jagged(
        on_meta(9, features), on_meta(4, dtype=torch.int64), min_seqlen=1, max_seqlen=4
    )


def of_sequences() -> dict[str, Callable[[], Any]]:
    """Calls of recurrent layers with all tensors on one device."""

    def run(cell: Any, given: tuple[str, ...] = (), evaluate: bool = False, **options: Any) -> Any:
        layer = cell(4, 5, 2, device="meta", **options).train(not evaluate)
        arguments = {"lengths": on_meta(3, dtype=torch.int64), "reset": on_meta(6, 3, dtype=torch.bool)}
        return layer(on_meta(6, 3, 4), **{name: arguments[name] for name in given})

    found: dict[str, Callable[[], Any]] = {}
    for cell in RECURRENT:
        for norm in ("layer", "rms", "batch"):
            for given in ((), ("lengths",), ("reset",), ("lengths", "reset")):
                name = " ".join([cell.__name__, norm, *given])
                found[name] = partial(run, cell, given, norm=norm, bidirectional=True)
            for options in ({"dropout": 0.5}, {"zoneout": 0.5}, {"evaluate": True}):
                name = " ".join([cell.__name__, norm, "lengths", *options])
                found[name] = partial(run, cell, ("lengths",), norm=norm, **options)
        found[f"{cell.__name__} alone, reset"] = partial(run, cell, ("reset",), norm=None)
    for cell in (normwise.LSTM, normwise.GRU, normwise.RNN):
        found[f"{cell.__name__}.step"] = lambda cell=cell: cell(4, 5, norm="layer", device="meta").step(
            on_meta(3, 4), reset=on_meta(3, dtype=torch.bool)
        )
    for cell in (normwise.LSTMCell, normwise.GRUCell, normwise.RNNCell):
        found[cell.__name__] = lambda cell=cell: cell(4, 5, norm="layer", device="meta")(on_meta(3, 4))
        found[f"{cell.__name__} batch"] = lambda cell=cell: cell(4, 5, norm="batch", device="meta")(
            on_meta(3, 4), step=1
        )
    return found


def of_norms() -> dict[str, Callable[[], Any]]:
    """Those of `CALLS`, and others, with all tensors on one device."""

    def usual(call: str) -> Callable[[], Any]:
        make, arguments = CALLS[call]
        layer, given = make().to("meta"), {name: value.to("meta") for name, value in arguments().items()}
        return partial(layer, input_of(call).to("meta").requires_grad_(), **given)

    def run(make: Callable[..., nn.Module], *given: str, evaluate: bool = False) -> Any:
        arguments = {
            "mask": on_meta(N, L, dtype=torch.bool),
            "rows": on_meta(N, C, dtype=torch.bool),
            "lengths": on_meta(N, dtype=torch.int64),
            "residual": on_meta(N, C, L),
            "add": on_meta(N, C, L),
        }
        named = {"mask" if name == "rows" else name: arguments[name] for name in given}
        return make(device="meta").train(not evaluate)(on_meta(N, C, L), **named)

    batch, ramp = partial(normwise.BatchNorm1d, C), normwise.LinearRamp
    renorm = partial(normwise.BatchRenorm1d, C)
    return {
        **{call: usual(call) for call in CALLS},
        "momentum None, all": partial(run, partial(batch, momentum=None, act="silu"), "mask", "residual"),
        "frozen": partial(run, partial(normwise.FrozenBatchNorm1d, C), "mask"),
        "sync, mask": partial(run, partial(normwise.SyncBatchNorm, C), "mask"),
        "sync, lengths, momentum None": partial(run, partial(normwise.SyncBatchNorm, C, momentum=None), "lengths"),
        "ghost, lengths": partial(run, partial(batch, virtual_batch_size=3), "lengths"),
        "ghost, momentum None": partial(run, partial(batch, virtual_batch_size=3, momentum=None)),
        "renorm, mask": partial(run, renorm, "mask"),
        "renorm, momentum None": partial(run, partial(renorm, momentum=None)),
        "renorm, ramps": partial(run, partial(renorm, r_max=ramp(1, 3, 0, 10), d_max=ramp(0, 5, 0, 10))),
        "renorm, evaluation": partial(run, renorm, "lengths", evaluate=True),
        "layer, add": partial(run, partial(normwise.LayerNorm, L), "add", "rows"),
        "layer, dim": partial(run, partial(normwise.LayerNorm, C, dim=1)),
        "rms, add": partial(run, partial(normwise.RMSNorm, L), "add"),
        "rms, mask": partial(run, partial(normwise.RMSNorm, L), "rows"),
        "group, lengths": partial(run, partial(normwise.GroupNorm, 4, C), "lengths", "residual"),
        "instance, evaluation": partial(
            run, partial(normwise.InstanceNorm1d, C, track_running_stats=True), "lengths", evaluate=True
        ),
        "functional": lambda: normwise.functional.batch_norm(on_meta(N, C, L), training=True),
        **{
            f"{make.__name__}, {kind.__name__}": lambda make=make, kind=kind: make(C, device="meta")(kind(C))
            for kind in (packed_on_meta, jagged_on_meta)
            for make in (normwise.BatchNorm1d, normwise.BatchRenorm1d, normwise.SyncBatchNorm, normwise.LayerNorm)
        },
    }


ON_META = of_norms() | of_sequences()


def all_of(call: Callable[[], Any]) -> Launches:
    """A forward and backward on meta."""
    with meta_as_gpu(), Launches("meta") as found:
        y = call()
        while isinstance(y, tuple) and not isinstance(y, PackedSequence):
            y = y[0]
        y = y.data if isinstance(y, PackedSequence) else y.values() if y.is_nested else y
        y.backward(torch.ones_like(y))
    assert found.count
    return found


@pytest.mark.parametrize("call", ON_META)
def test_a_usual_call_does_nothing_that_a_cuda_graph_forbids(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No value of a tensor is read, none is copied to or from the CPU, and no memory of the host is pinned."""

    def pinned(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("pinned memory")

    monkeypatch.setattr(Tensor, "pin_memory", pinned)
    found = all_of(ON_META[call])
    assert found.copies == {}
    assert found.waits == {}


def of_the_host() -> dict[str, Callable[[], Any]]:
    """Calls whose lengths are on the CPU: worked on there and sent, which a CUDA graph forbids."""
    lengths, mask = torch.tensor([3, 6, 2]), torch.ones(N, L, dtype=torch.bool)
    found: dict[str, Callable[[], Any]] = {
        "mask, a list": lambda: normwise.GroupNorm(4, C, device="meta")(on_meta(N, C, L), mask=mask.tolist()),
        "lengths, a list": lambda: normwise.BatchNorm1d(C, device="meta")(on_meta(3, C, L), lengths=[3, 6, 2]),
        "InstanceNorm1d": lambda: normwise.InstanceNorm1d(C, device="meta")(packed_on_meta(C)),
        "GroupNorm": lambda: normwise.GroupNorm(4, C, device="meta")(packed_on_meta(C)),
    }
    for cell in RECURRENT:
        for norm in (None, "layer", "batch"):
            make = partial(cell, 4, 5, 2, norm=norm, bidirectional=True, device="meta")
            found[f"{cell.__name__} {norm} packed"] = lambda make=make: make()(packed_on_meta(4))
            found[f"{cell.__name__} {norm} packed, reset"] = lambda make=make: make()(
                packed_on_meta(4), reset=on_meta(4, 3, dtype=torch.bool)
            )
            found[f"{cell.__name__} {norm} packed, evaluation"] = lambda make=make: make().eval()(packed_on_meta(4))
            found[f"{cell.__name__} {norm} lengths"] = lambda make=make: make()(on_meta(6, 3, 4), lengths=lengths)
    return found


@pytest.mark.parametrize("call", of_the_host())
def test_what_is_on_the_host_is_sent_without_a_wait(call: str) -> None:
    """A copy that blocks is a wait."""
    assert all_of(of_the_host()[call]).waits == {}


def test_packed_sequences_are_placed_without_a_wait() -> None:
    """Lengths that are on the CPU are worked on there, and the places sent."""
    x, lengths = torch.randn(N, L, C, requires_grad=True), torch.tensor([10, 9, 8, 7, 5, 5, 4, 2])
    packed = pack_padded_sequence(x, lengths, batch_first=True)
    layer = normwise.InstanceNorm1d(C)
    expected = layer(packed).data
    with as_on_gpu():
        assert_close(layer(packed).data, expected, kind="forward", count=L, scale=1.0)


class Nodes:
    """A backend of torch.compile that keeps the graphs it is given."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __call__(self, graph: Any, examples: Any) -> Any:
        self.names += [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        return graph.forward


MASKED = ["batch, mask", "instance, mask", "group, mask", "batch, lengths", "batch, mask, evaluation"]


@pytest.mark.parametrize(
    ("device", "call"), [("meta", call) for call in CALLS] + [("cpu", call) for call in ("batch", "rms", *MASKED)]
)
def test_a_compiler_for_a_gpu_sees_operations_that_it_can_fuse(call: str, device: str) -> None:
    """On the CPU a norm that ATen has no kernel for is one node. (meta stands for any other device.) BatchRenorm's
    correction, a few numbers a channel, is one everywhere: what it is taken from changes before the backward."""
    torch.compiler.reset()
    make, arguments = CALLS[call]
    layer, given = make().to(device), {name: value.to(device) for name, value in arguments().items()}
    x, nodes = input_of(call).to(device).requires_grad_(), Nodes()
    y = torch.compile(layer, backend=nodes, fullgraph=True)(x, **given)
    y.backward(torch.ones_like(y))
    opaque = {name for name in nodes.names if "normwise" in name}
    if call == "renorm":
        assert opaque == {"normwise.renorm_correction.default"}
    else:
        assert bool(opaque) == (device == "cpu" and call in MASKED), opaque
    assert nodes.names


@pytest.mark.parametrize("call", CALLS)
def test_a_trace_for_a_gpu_holds_operations_of_aten_alone(call: str) -> None:
    """Forward and backward, as make_fx sees them."""
    make, arguments = CALLS[call]
    layer, given = make().to("meta"), {name: value.to("meta") for name, value in arguments().items()}

    def forward_and_gradient(x: Tensor) -> Tensor:
        y = layer(x, **given)
        return torch.autograd.grad(y, x, torch.ones_like(y))[0]

    graph = make_fx(forward_and_gradient)(input_of(call).to("meta").requires_grad_()).graph
    targets = {str(node.target) for node in graph.nodes if node.op == "call_function"}
    assert targets
    assert {name for name in targets if not name.startswith(("aten.", "<built-in function"))} == set()
