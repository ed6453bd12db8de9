"""RunningNorm: exact statistics of all that was seen, and the way back."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import normwise
from normwise import RunningNorm
from support.on_ranks import on_ranks
from support.tolerances import assert_close

SIZES = [1, 7, 0, 100, 3, 2]


def pieces(*shape: int, mean: float = 3.0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [(torch.randn(n, *shape) * 5 + mean).to(dtype) for n in SIZES]


@pytest.mark.parametrize("mean", [0.0, 1e4])
@pytest.mark.parametrize("shape", [(), (3,), (2, 4)])
def test_statistics_are_those_of_all_elements_at_once(shape, mean):
    data = pieces(*shape, mean=mean)
    norm = RunningNorm(shape)
    for x in data:
        y = norm(x)
    whole = torch.cat(data).double()
    assert_close(norm.mean, whole.mean(0))
    assert_close(norm.var, whole.var(0, unbiased=False))
    assert torch.equal(norm.count, torch.full(shape, len(whole), dtype=torch.float64))
    expected = (data[-1].double() - whole.mean(0)) / whole.std(0, unbiased=False)
    assert_close(y, expected.float())


def test_the_order_and_size_of_batches_do_not_matter():
    data = torch.cat(pieces(3))
    found = []
    for sizes in ([len(data)], [1] * len(data), [50, len(data) - 50]):
        norm = RunningNorm(3)
        for x in data.split(sizes):
            norm(x)
        found.append((norm.mean, norm.var))
    for other in found[1:]:
        assert_close(other[0], found[0][0])
        assert_close(other[1], found[0][1])


@pytest.mark.parametrize("form", ["mask", "elements", "lengths"])
def test_invalid_elements_do_not_count_and_come_out_as_zero(form):
    x = torch.randn(4, 6, 3)
    lengths = torch.tensor([6, 2, 0, 5])
    valid = (torch.arange(6) < lengths[:, None])[..., None].expand(x.shape)
    if form == "elements":
        valid = torch.rand(x.shape) < 0.6
    given = {"mask": {"mask": valid[..., 0]}, "elements": {"mask": valid}, "lengths": {"lengths": lengths}}[form]
    norm = RunningNorm(3)
    x = x.masked_fill(~valid, float("nan"))
    y = norm(x, **given)
    for c in range(3):
        rest = x[..., c][valid[..., c]].double()
        assert_close(norm.mean[c], rest.mean())
        assert_close(norm.var[c], rest.var(unbiased=False))
        assert norm.count[c] == len(rest)
    assert torch.equal(y == 0, ~valid)


def test_a_feature_that_was_never_valid_stays_as_it_is():
    norm = RunningNorm(2)
    norm(torch.randn(5, 2), mask=torch.tensor([True, False]).expand(5, 2))
    assert (norm.mean[1], norm.var[1], norm.count[1]) == (0, 1, 0)


def test_evaluation_and_update_and_reset():
    norm = RunningNorm(3).eval()
    x = torch.randn(9, 3) + 4
    assert torch.equal(norm(x), x)  # nothing seen yet
    norm.update(x)
    assert_close(norm.mean, x.double().mean(0))
    before = norm.mean.clone()
    norm(x * 3)
    assert torch.equal(norm.mean, before)
    norm.reset_running_stats()
    assert torch.equal(norm(x), x)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_batch_that_is_not_finite_is_left_out(bad):
    norm = RunningNorm(2)
    norm(torch.randn(5, 2))
    before = copy.deepcopy(norm.state_dict())
    norm(torch.tensor([[1.0, bad]]))
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())


def test_the_gradient_takes_the_statistics_for_constants():
    norm = RunningNorm(3, eps=0.1).double()
    x = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(8, 3, dtype=torch.float64)
    norm(x).backward(upstream)
    assert_close(x.grad, upstream / (x.detach().var(0, unbiased=False) + 0.1).sqrt())


def test_checkpointing_counts_a_batch_once():
    norm = RunningNorm(3, affine=True)
    x = torch.randn(8, 3, requires_grad=True)
    checkpoint(norm, x, use_reentrant=False).sum().backward()
    assert (norm.count == 8).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"eps": 1e-2}, {"center": False}, {"affine": True}])
def test_inverse_brings_the_input_back(options, dtype):
    norm = RunningNorm(3, **options).to(dtype)
    if norm.weight is not None:
        torch.nn.init.normal_(norm.weight, 1.0, 0.1), torch.nn.init.normal_(norm.bias)
    x = (torch.randn(20, 3) * 7 + 2).to(dtype)
    assert_close(norm.inverse(norm(x)), x, kind="composed")


def test_there_and_back_of_a_constant_is_not_crushed():
    """What a model says beyond the constant comes out as it says it, not times a deviation of 0."""
    for norm in (RunningNorm(1), RunningNorm(1, per_instance=True)):
        x = torch.full((1, 9, 1), 0.1)
        assert torch.equal(norm(x), torch.zeros_like(x))
        assert_close(norm.inverse(torch.ones(1, 2, 1)), torch.full((1, 2, 1), 1.1))


@pytest.mark.parametrize("options", [{}, {"per_instance": True}])
def test_a_deviation_that_is_small_beside_the_mean_is_one_nevertheless(options):
    """Seconds since 1970 over an hour, in float64; and the same number a million times, in pieces."""
    x = 1.7e9 + 3600 * torch.rand(2, 500, 1, dtype=torch.float64)
    x[1] = 1.7e9 + torch.rand(500, 1, dtype=torch.float64)
    for part in x.split(1):
        norm = RunningNorm(1, **options)
        y = norm(part)
        assert_close(y.std(correction=0), torch.ones((), dtype=torch.float64), kind="grad")
        assert_close(norm.inverse(y), part)
    norm = RunningNorm(1, **options)
    for n in (1, 999, 300_000, 3):
        x = torch.full((1, n, 1), 0.1, dtype=torch.float64)
        assert norm(x).abs().max() < 1e-9
        assert_close(norm.inverse(torch.ones(1, 2, 1)), torch.full((1, 2, 1), 1.1))


@pytest.mark.parametrize("shape", [(3,), (2, 3)])
def test_one_observation_without_a_batch(shape):
    norm, twin = RunningNorm(shape), RunningNorm(shape)
    for x in torch.randn(5, *shape):
        assert torch.equal(norm(x), twin(x[None])[0])
    mask = torch.rand(shape) < 0.5
    norm(x, mask=mask), twin(x[None], mask=mask)
    for name, value in norm.state_dict().items():
        assert torch.equal(value, twin.state_dict()[name]), name


@pytest.mark.parametrize("options", [{}, {"per_instance": True}])
def test_torch_fx_sees_one_node_there_and_one_back(options):
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = RunningNorm(3, **options), torch.nn.Linear(3, 3)
            self.bn = torch.nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(self.norm(x).flatten(0, 1))
            return self.norm.inverse(self.bn(y).unflatten(0, (4, 5)))

    net = Net()
    x = torch.randn(4, 5, 3) * 3 + 1
    net(x)
    net.eval()
    graph = torch.fx.symbolic_trace(net)
    assert [node.target for node in graph.graph.nodes if "norm" in str(node.target)] == ["norm", "norm"]
    assert torch.equal(graph(x), net(x))
    folded, report = normwise.fold(net, x)
    assert [change.name for change in report.changed] == ["bn"]
    assert_close(folded(x), net(x), kind="composed")


def test_other_units_give_the_same():
    x = torch.randn(4, 12, 2, dtype=torch.float64)
    for make in (lambda: RunningNorm(2), lambda: RunningNorm(2, per_instance=True)):
        first = make()(x)
        for scale in (1e-9, 1e-3, 1e6):
            assert_close(make()(x * scale), first)


def test_numbers_are_cut_off_at_clip():
    norm = RunningNorm(clip=1.5)
    y = norm(torch.randn(100))
    assert y.abs().max() == 1.5


def test_rewards_are_divided_by_the_deviation_of_returns():
    norm = RunningNorm(center=False).eval()
    returns, rewards = torch.randn(64) * 9 + 5, torch.randn(64)
    norm.update(returns)
    assert_close(norm(rewards), (rewards.double() / returns.double().std(unbiased=False)).float())


def test_statistics_keep_their_dtype_and_go_with_the_state_dict():
    norm = RunningNorm(3)
    norm(torch.randn(300, 3))
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    for convert in (torch.nn.Module.half, torch.nn.Module.bfloat16, torch.nn.Module.float):
        convert(norm)
        assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())
    file = io.BytesIO()
    torch.save(norm.state_dict(), file)
    file.seek(0)
    other = RunningNorm(3)
    other.load_state_dict(torch.load(file))
    x = torch.randn(5, 3)
    assert torch.equal(other.eval()(x), norm.eval()(x))


def _of_one_rank(rank: int, across: bool) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(rank)
    norm = RunningNorm(3, across_ranks=across)
    for n in (4, 0, 2 + rank):
        norm(torch.randn(n, 3) + rank)
    return norm.mean, norm.var, norm.count


def ranks(across: bool) -> tuple[Tensor, Tensor, Tensor]:
    return _of_one_rank(torch.distributed.get_rank(), across)


@pytest.mark.parametrize("across", [True, False])
def test_across_ranks(across):
    data = []
    for rank in range(3):
        torch.manual_seed(rank)
        data.append(torch.cat([torch.randn(n, 3) + rank for n in (4, 0, 2 + rank)]).double())
    for rank, (mean, var, count) in enumerate(on_ranks(3, ranks, across)):
        whole = torch.cat(data) if across else data[rank]
        assert_close(mean, whole.mean(0))
        assert_close(var, whole.var(0, unbiased=False))
        assert (count == len(whole)).all()


def test_instances_are_normalized_over_their_steps():
    x = torch.randn(4, 9, 3) * 3 + 100
    lengths = torch.tensor([9, 4, 1, 0])
    norm = RunningNorm(3, per_instance=True)
    y = norm(x, lengths=lengths)
    for i, n in enumerate(lengths):
        part = x[i, :n].double()
        if n > 1:
            assert_close(y[i, :n], ((part - part.mean(0)) / part.std(0, unbiased=False)).float(), kind="composed")
        assert (y[i, n:] == 0).all()
    assert torch.equal(norm.eval()(x, lengths=lengths), y)
    assert not list(norm.buffers())


@pytest.mark.parametrize("affine", [False, True])
def test_the_forecast_comes_back_in_the_units_of_its_instance(affine):
    norm = RunningNorm(3, per_instance=True, affine=affine)
    x = torch.randn(4, 9, 3) * 3 + 100
    y = norm(x)
    assert_close(norm.inverse(y), x, kind="composed")
    assert norm.inverse(torch.zeros(5, 4, 2, 3)).shape == (5, 4, 2, 3)
    first = norm.scale
    norm(torch.randn(2, 9, 3))
    assert_close(norm.inverse(y, scale=first), x, kind="composed")
    assert_close(norm.inverse(torch.ones(2, 1, 3), shift=False), norm.scale.deviation.float())


def test_compiled_without_a_break():
    for options in ({}, {"per_instance": True}):
        eager, compiled = RunningNorm(3, **options), RunningNorm(3, **options)
        run = torch.compile(compiled, backend="aot_eager", fullgraph=True)
        for n in (4, 6):
            x = torch.randn(n, 5, 3)
            assert_close(run(x), eager(x))
        if not options:
            assert_close(compiled.mean, eager.mean)
            assert torch.equal(compiled.count, eager.count)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: RunningNorm(3)(torch.randn(4, 2)), normwise.ShapeError, "must end in"),
        (lambda: RunningNorm(3)(torch.randint(3, (4, 3))), TypeError, "floating"),
        (lambda: RunningNorm(3)(torch.randn(4, 3), mask=torch.ones(5, dtype=torch.bool)), normwise.ShapeError, "mask"),
        (lambda: RunningNorm(3)(torch.randn(4, 3), lengths=[1, 1, 1, 1]), normwise.ShapeError, "lengths"),
        (lambda: RunningNorm(3, per_instance=True)(torch.randn(4, 3)), normwise.ShapeError, "time series"),
        (lambda: RunningNorm(3, per_instance=True).inverse(torch.randn(4, 3)), RuntimeError, "normalize them first"),
        (lambda: RunningNorm(3, per_instance=True).update(torch.randn(4, 3)), RuntimeError, "none to update"),
        (lambda: RunningNorm(3, eps=-1.0), ValueError, "eps"),
        (lambda: RunningNorm(3, clip=0.0), ValueError, "clip"),
        (lambda: RunningNorm(2.5), TypeError, "shape"),
    ],
)
def test_what_is_refused(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_a_forecast_of_other_instances_is_refused():
    norm = RunningNorm(3, per_instance=True)
    norm(torch.randn(4, 9, 3))
    for shape in ((3, 2, 3), (4, 3)):
        with pytest.raises(normwise.ShapeError, match="4 instances"):
            norm.inverse(torch.randn(shape))
