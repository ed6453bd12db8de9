"""`functional.batch_norm(return_stats=True)`: new running statistics are values, and nothing that is given changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.checkpoint import checkpoint

import normwise
from normwise.functional import BatchNormOutput, batch_norm
from support.backends import using
from support.on_ranks import on_ranks
from support.tolerances import assert_close

C = 4
X = (6, C, 5)
SEGMENTS = torch.tensor([0, 2, 2, 0, 1, 1, 0])


def fresh() -> tuple[Tensor, Tensor]:
    return torch.randn(C), torch.rand(C) + 0.5


# What a call is given beside the input, and the layer that does the same.
CALLS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "bare": ({}, {}),
    "mask": ({"mask": torch.arange(5) < torch.tensor([5, 2, 3, 0, 1, 4])[:, None]}, {}),
    "lengths": ({"lengths": torch.tensor([5, 2, 3, 1, 1, 4])}, {}),
    "correction": ({"correction": 0}, {"correction": 0}),
    "act": ({"act": "silu"}, {"act": "silu"}),
    "residual": ({"residual": torch.ones(X)}, {}),
    "scale": ({"scale": torch.ones(6, C), "shift": torch.ones(6, C)}, {}),
    "momentum": ({"momentum": 0.7}, {"momentum": 0.7}),
}


each_backend = pytest.mark.parametrize("backend", ["chosen", "kernels", "aten", "reference"])


@each_backend
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_they_are_what_a_layer_would_hold(name: str, training: bool, backend: str) -> None:
    call, options = CALLS[name]
    if backend == "aten" and name in ("mask", "lengths"):
        pytest.skip("ATen has no masks")
    layer = normwise.BatchNorm1d(C, **options).train(training)
    with torch.no_grad():
        for t, start in zip(layer.buffers(), fresh(), strict=False):
            t.copy_(start)
    mean, var = (t.clone() for t in (layer.running_mean, layer.running_var))
    before, x = (mean.clone(), var.clone()), torch.randn(X)
    in_call = {k: v for k, v in call.items() if k not in options}
    with using(backend):
        found = batch_norm(x, mean, var, training=training, return_stats=True, **call)
        expected = layer(x, **in_call)
    assert isinstance(found, BatchNormOutput)
    assert torch.equal(mean, before[0])
    assert torch.equal(var, before[1])
    assert_close(found.output, expected, count=30)
    assert_close(found.running_mean, layer.running_mean, count=30)
    assert_close(found.running_var, layer.running_var, count=30)
    assert found.num_batches_tracked is None
    assert not found.running_mean.requires_grad
    assert not found.running_var.requires_grad
    assert (found.running_mean is mean) is not training


def test_segments_packed_rows_and_another_axis() -> None:
    rows = torch.randn(7, C)
    cases: list[tuple[Any, dict[str, Any], dict[str, Any]]] = [
        (rows, {"segments": SEGMENTS}, {}),
        (pack_sequence([rows[:5], rows[5:]]), {}, {}),
        (torch.randn(3, 5, C), {"dim": -1}, {"dim": -1}),
    ]
    for x, call, options in cases:
        mean, var = fresh()
        layer = normwise.BatchNorm1d(C, **options)
        with torch.no_grad():
            layer.running_mean.copy_(mean)
            layer.running_var.copy_(var)
        found = batch_norm(x, mean, var, training=True, return_stats=True, **call)
        expected = layer(x, **{k: v for k, v in call.items() if k not in options})
        assert_close(getattr(found.output, "data", found.output), getattr(expected, "data", expected), count=15)
        assert_close(found.running_mean, layer.running_mean, count=15)
        assert_close(found.running_var, layer.running_var, count=15)


def test_a_cumulative_average_of_batches() -> None:
    layer = normwise.BatchNorm1d(C, momentum=None)
    stats: tuple[Any, ...] = (torch.zeros(C), torch.ones(C), torch.tensor(0))
    for seen in range(3):
        x, given = torch.randn(8, C), stats
        layer(x)
        _, *stats = batch_norm(  # type: ignore[assignment]
            x, *stats[:2], training=True, momentum=None, num_batches_tracked=stats[2], return_stats=True
        )
        assert given[2] == seen
        for name, t in zip(("running_mean", "running_var", "num_batches_tracked"), stats, strict=True):
            assert torch.equal(t, layer.get_buffer(name)), name


def test_a_count_of_batches_in_place() -> None:
    tracked, (mean, var) = torch.tensor(3), fresh()
    batch_norm(torch.randn(8, C), mean, var, training=True, num_batches_tracked=tracked)
    assert tracked == 4
    batch_norm(torch.randn(8, C), mean, var, num_batches_tracked=tracked, momentum=None)
    assert tracked == 4


def test_a_batch_that_is_not_finite_moves_nothing() -> None:
    (mean, var), tracked, x = fresh(), torch.tensor(3), torch.randn(8, C)
    x[2, 1] = float("inf")
    _, *found = batch_norm(x, mean, var, training=True, num_batches_tracked=tracked, return_stats=True)
    for new, old in zip(found, (mean, var, tracked), strict=True):
        assert torch.equal(new, old)
        assert new.data_ptr() != old.data_ptr()


@each_backend
def test_two_forwards_before_a_backward_though_buffers_are_written_between(backend: str) -> None:
    """As DistributedDataParallel does before every forward: it copies the first rank's buffers into the others'."""
    x, (mean, var) = torch.randn(8, C, requires_grad=True), fresh()
    weight = torch.randn(C, requires_grad=True)

    def total(written: bool) -> Tensor:
        m, v = mean.clone(), var.clone()
        losses = []
        for scale in (1.0, 2.0):
            out, m_new, v_new, _ = batch_norm(scale * x, m, v, weight, training=True, return_stats=True)
            losses.append((out**3).sum())
            if written:
                m.copy_(m_new)
                v.copy_(v_new)
            else:
                m, v = m_new, v_new
        return sum(losses)  # type: ignore[return-value]

    with using(backend):
        expected = torch.autograd.grad(total(False), [x, weight])
        for got, truth in zip(torch.autograd.grad(total(True), [x, weight]), expected, strict=True):
            assert torch.equal(got, truth)


def loss(weight: Tensor, x: Tensor, mean: Tensor, var: Tensor, **call: Any) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    y, mean, var, _ = batch_norm(x, mean, var, weight, training=True, return_stats=True, **call)
    return (y**3).sum(), (mean, var)


def test_torch_func() -> None:
    weight, x, (mean, var) = torch.randn(C), torch.randn(8, C), fresh()
    leaf = weight.clone().requires_grad_()
    value, stats = loss(leaf, x, mean, var)
    expected = torch.autograd.grad(value, leaf)[0]
    got, new = torch.func.grad(loss, has_aux=True)(weight, x, mean, var)
    assert_close(got, expected, kind="grad", count=8)
    for a, b in zip(new, stats, strict=True):
        assert_close(a, b, count=8)
    jacobian, new = torch.func.jacrev(loss, has_aux=True)(weight, x, mean, var)
    assert_close(jacobian, expected, kind="grad", count=8)
    _, tangent, new = torch.func.jvp(lambda w: loss(w, x, mean, var), (weight,), (torch.ones(C),), has_aux=True)
    assert_close(tangent, expected.double().sum(), kind="grad", count=32, scale=float(expected.abs().sum()))
    for a, b in zip(new, stats, strict=True):
        assert_close(a, b, count=8)


@pytest.mark.parametrize("batched", ["input", "weight", "statistics", "mask", "all"])
def test_vmap(batched: str) -> None:
    """Statistics are batched where the input, the mask or they themselves are; a captured one is not changed."""
    mask = torch.ones(3, 8, dtype=torch.bool)
    mask[1, 5:] = mask[2, 2:5] = False
    every: dict[str, tuple[Tensor, ...]] = {
        "weight": (torch.randn(3, C),),
        "input": (torch.randn(3, 8, C),),
        "statistics": (torch.randn(3, C), torch.rand(3, C) + 0.5),
        "mask": (mask,),
    }
    in_dims = tuple(0 if batched in (name, "all") else None for name, tensors in every.items() for _ in tensors)
    tensors = [t for named in every.values() for t in named]
    given = [t if dim == 0 else t[0] for t, dim in zip(tensors, in_dims, strict=True)]

    def gradient(weight: Tensor, x: Tensor, mean: Tensor, var: Tensor, mask: Tensor) -> Any:
        return torch.func.grad(loss, has_aux=True)(weight, x, mean, var, mask=mask)

    before = [t.clone() for t in given]
    got, (mean, var) = torch.vmap(gradient, in_dims)(*given)
    for now, then in zip(given, before, strict=True):
        assert torch.equal(now, then)
    for i in range(3):
        leaf, *others = (t[i] if dim == 0 else t for t, dim in zip(given, in_dims, strict=True))
        leaf = leaf.clone().requires_grad_()
        value, stats = loss(leaf, *others[:3], mask=others[3])
        assert_close(got[i], torch.autograd.grad(value, leaf)[0], kind="grad", count=8)
        assert_close(mean[i], stats[0], count=8)
        assert_close(var[i], stats[1], count=8)


def test_a_second_derivative() -> None:
    x, weight = torch.randn(5, 2, dtype=torch.float64), torch.randn(2, dtype=torch.float64)
    mean, var = torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)

    def f(x: Tensor, weight: Tensor) -> Tensor:
        return batch_norm(x, mean, var, weight, training=True, return_stats=True).output  # type: ignore[no-any-return]

    leaves = x.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(f, leaves)
    assert torch.autograd.gradgradcheck(f, leaves)


@pytest.mark.parametrize("name", ["bare", "mask", "correction", "cumulative"])
def test_compiles_in_one_graph(name: str) -> None:
    torch._dynamo.reset()
    call = {"momentum": None, "num_batches_tracked": torch.tensor(2)} if name == "cumulative" else CALLS[name][0]
    x, (mean, var) = torch.randn(X), fresh()
    before = mean.clone(), var.clone()

    def f(x: Tensor, mean: Tensor, var: Tensor) -> BatchNormOutput:
        found = batch_norm(x, mean, var, training=True, return_stats=True, **call)
        assert isinstance(found, BatchNormOutput)
        return found

    expected = f(x, mean, var)
    found = torch.compile(f, fullgraph=True, backend="aot_eager")(x, mean, var)
    for got, truth in zip(found, expected, strict=True):
        assert (got is None) == (truth is None)
        if truth is not None and truth.is_floating_point():
            assert_close(got, truth, kind="composed", count=30)
        elif truth is not None:
            assert torch.equal(got, truth)
    assert torch.equal(mean, before[0])
    assert torch.equal(var, before[1])


def test_a_forward_that_checkpointing_repeats() -> None:
    x, (mean, var) = torch.randn(8, C, requires_grad=True), fresh()
    for reentrant in (False, True):
        seen = []

        def f(x: Tensor) -> Tensor:
            y, *stats = batch_norm(x, mean, var, training=True, return_stats=True)
            seen.append(stats)  # noqa: B023  called in this turn of the loop
            return (y**3).sum()

        checkpoint(f, x, use_reentrant=reentrant).backward()
        first, again = seen
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])


def test_symbolic_tracing_makes_one_node() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
            found = batch_norm(x, mean, var, training=True, return_stats=True)
            return found.output, found.running_mean

    x, (mean, var) = torch.randn(8, C), fresh()
    traced = torch.fx.symbolic_trace(Net())
    for got, truth in zip(traced(x, mean, var), Net()(x, mean, var), strict=True):
        assert torch.equal(got, truth)


def test_what_is_refused() -> None:
    x, (mean, var) = torch.randn(8, C), fresh()
    with pytest.raises(ValueError, match="return_stats=True returns running statistics, but got none"):
        batch_norm(x, training=True, return_stats=True)
    with pytest.raises(ValueError, match="num_batches_tracked="):
        batch_norm(x, mean, var, training=True, momentum=None)
    with pytest.raises(TypeError, match="must be a tensor of int64, but got int"):
        batch_norm(x, mean, var, training=True, num_batches_tracked=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"num_batches_tracked\[k\]"):
        batch_norm(x, mean, var, training=True, num_batches_tracked=torch.zeros(3, dtype=torch.int64))


def stats_on_rank(rows: list[int]) -> tuple[Tensor, ...]:
    """On each rank its part of a batch, twice: the statistics that it is given stay, those it gets are used."""
    torch.manual_seed(3)
    x, start, rank = torch.randn(sum(rows), C, 5) * 2 + 1, fresh(), dist.get_rank()
    first = sum(rows[:rank])
    given = [t.clone() for t in start]
    mine = x[first : first + rows[rank]]
    y, *stats, _ = batch_norm(mine, *given, training=True, return_stats=True, process_group=dist.group.WORLD)
    again = batch_norm(mine, *stats, training=True, return_stats=True, process_group=dist.group.WORLD)
    assert all(torch.equal(now, before) for now, before in zip(given, start, strict=True))
    return x, *start, y, *again[1:3]


@pytest.mark.parametrize("rows", [[3, 2], [1, 4]], ids=str)
def test_those_of_several_ranks_are_those_of_the_whole_batch(rows: list[int]) -> None:
    found = on_ranks(2, stats_on_rank, rows)
    x, mean, var = found[0][:3]
    y, *stats, _ = batch_norm(x, mean, var, training=True, return_stats=True)
    expected = batch_norm(x, *stats, training=True, return_stats=True)
    assert_close(torch.cat([part[3] for part in found]), y, count=25)
    for part in found:
        assert_close(part[4], expected.running_mean, count=25)
        assert_close(part[5], expected.running_var, count=25)
