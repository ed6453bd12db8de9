"""Running averages after what happens to them in real trainings; where torch.nn is wrong, the test shows it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import normwise
from support.backends import BACKENDS, using
from support.tolerances import assert_close

BOTH = pytest.mark.parametrize("make", [normwise.BatchNorm1d, nn.BatchNorm1d], ids=["normwise", "torch.nn"])
Make = Callable[..., nn.Module]


def averages(layer: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in layer.named_buffers() if name.startswith("running")}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def is_ours(make: Make) -> bool:
    return make is normwise.BatchNorm1d


# --- batches that are not finite -----------------------------------------------------------------------------------

SPOILT = {
    "nan": lambda x: x.index_fill(0, torch.tensor([1]), torch.nan),
    "inf": lambda x: x.index_fill(0, torch.tensor([1]), torch.inf),
    "one channel": lambda x: torch.cat([x[:, :1] * torch.nan, x[:, 1:]], 1),
    "overflow of the variance": lambda x: x * 1e30,
}


@pytest.mark.parametrize("how", SPOILT)
@pytest.mark.parametrize("shape", [(6, 3), (64, 3), (5, 3, 7), (300, 3, 50)], ids=str)
@pytest.mark.parametrize(
    ("make", "backend"),
    [*((normwise.BatchNorm1d, backend) for backend in BACKENDS), (nn.BatchNorm1d, "chosen")],
    ids=[*BACKENDS, "torch.nn"],
)
def test_a_batch_that_is_not_finite_is_left_out(make: Make, how: str, shape: tuple[int, ...], backend: str) -> None:
    layer = make(3)
    x = torch.randn(shape)
    with using(backend), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        layer(x)
        before = averages(layer)
        for _ in range(2):
            layer(SPOILT[how](x))
        if not is_ours(make):  # from now on evaluation is NaN or 0, for ever
            assert not all(t.isfinite().all() for t in averages(layer).values())
            return
        assert same(averages(layer), before)
        layer(x)
    assert not same(averages(layer), before)
    assert (layer.num_batches_tracked, layer.num_batches_skipped) == (2, 2)
    assert [str(w.message).startswith("BatchNorm1d skipped an update of its running averages") for w in said] == [True]
    assert said[0].filename == __file__
    assert list(layer.state_dict()) == list(nn.BatchNorm1d(3).state_dict())
    layer.reset_running_stats()
    assert layer.num_batches_skipped == 0


@BOTH
def test_cumulative_averages_are_of_what_was_counted(make: Make) -> None:
    layer = make(3, momentum=None, dtype=torch.float64)
    batches = [torch.randn(8, 3, dtype=torch.float64) for _ in range(4)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i, x in enumerate(batches):
            layer(x)
            if i in (0, 2):
                layer(x * torch.nan)
    mean = torch.stack([x.mean(0) for x in batches]).mean(0)
    if is_ours(make):
        assert_close(layer.running_mean, mean)
        assert_close(layer.running_var, torch.stack([x.var(0) for x in batches]).mean(0))
    else:
        assert layer.running_mean.isnan().all()


@BOTH
def test_amp_an_overflow_of_float16_passes(make: Make) -> None:
    """A loss scale that is too large, or an early step that is: GradScaler leaves the step out, but torch.nn has learnt
    from the forward."""
    model = nn.Sequential(nn.Linear(4, 3), make(3))
    nn.init.constant_(model[0].weight, 100.0)
    with torch.autocast("cpu", dtype=torch.float16), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model(torch.rand(8, 4) * 1000)  # 4e5: beyond the 65504 of float16
    model.eval()
    assert model(torch.rand(8, 4)).isfinite().all().item() is is_ours(make)


@BOTH
def test_ema_stays_finite_after_a_spoilt_batch(make: Make) -> None:
    model = make(3)
    ema = AveragedModel(model, use_buffers=True, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for x in (torch.randn(8, 3), torch.randn(8, 3) * torch.nan, torch.randn(8, 3)):
            model(x)
            ema.update_parameters(model)
    assert ema.module.running_mean.isfinite().all().item() is is_ours(make)


def test_ema_averages_the_averages() -> None:
    """And a copy shares nothing with its original."""
    model = normwise.BatchNorm1d(3)
    ema = AveragedModel(model, use_buffers=True, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    ema.update_parameters(model)
    expected = {name: t.double() for name, t in averages(model).items()}
    frozen = copy.deepcopy(model)
    before = averages(frozen)
    for _ in range(4):
        model(torch.randn(8, 3) + 1)
        ema.update_parameters(model)
        for name, t in averages(model).items():
            expected[name] = 0.9 * expected[name] + 0.1 * t.double()
    for name, t in expected.items():
        assert_close(getattr(ema.module, name), t, kind="composed")
    assert same(averages(frozen), before)


def test_the_warning_comes_late_where_it_cannot_come_at_once() -> None:
    torch._dynamo.reset()
    layer = normwise.BatchNorm1d(3)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    before = averages(layer)
    compiled(torch.randn(8, 3) * torch.nan)
    assert same(averages(layer), before)
    assert (layer.num_batches_tracked, layer.num_batches_skipped) == (0, 1)
    with pytest.warns(UserWarning, match="skipped an update"):
        layer.eval()
    layer.train().eval()  # once


def test_instance_norm_leaves_out_the_sample() -> None:
    layer = normwise.InstanceNorm1d(3, track_running_stats=True, momentum=1.0)
    x = torch.randn(4, 3, 5)
    spoilt = x.clone()
    spoilt[2, :, 1] = torch.nan
    layer(spoilt)
    good = x[[0, 1, 3]].double()
    assert_close(layer.running_mean, good.mean((0, 2)), count=5)
    assert_close(layer.running_var, good.var(2).mean(0), count=5)
    theirs = nn.InstanceNorm1d(3, track_running_stats=True)
    theirs(spoilt)
    assert theirs.running_mean.isnan().all()


# --- activation checkpointing --------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_checkpointing_moves_averages_once(make: Make, reentrant: bool, momentum: float | None) -> None:
    layer, alone = make(3, momentum=momentum), make(3, momentum=momentum)
    for _ in range(3):
        x = torch.randn(40, 3, requires_grad=True)
        upstream = torch.randn(40, 3)
        checkpoint(layer, x, use_reentrant=reentrant).backward(upstream)
        (expected,) = torch.autograd.grad(alone(x), x, upstream)
        assert_close(x.grad, expected, kind="grad", count=40)
    right = same(averages(layer), averages(alone)) and bool(layer.num_batches_tracked == 3)
    assert right is is_ours(make)


def test_checkpointing_a_whole_net() -> None:
    """Several layers in one segment, InstanceNorm's averages too, and a recomputation that stops early."""

    def net() -> nn.Sequential:
        torch.manual_seed(0)
        blocks = [nn.Sequential(nn.Linear(4, 4), normwise.BatchNorm1d(4, act="relu")) for _ in range(3)]
        norm = normwise.InstanceNorm1d(4, track_running_stats=True)
        return nn.Sequential(*blocks, nn.Unflatten(1, (4, 1)), nn.ConstantPad1d(1, 0.5), norm)

    saved, plain = net(), net()
    x = torch.randn(32, 4, requires_grad=True)
    upstream = torch.randn(32, 4, 3)
    checkpoint(saved, x, use_reentrant=False).backward(upstream)
    plain(x.detach()).backward(upstream)
    for a, b in zip(saved.parameters(), plain.parameters(), strict=True):
        assert_close(a.grad, b.grad, kind="composed", count=32, scale=10.0)
    torch.testing.assert_close(saved.state_dict(), plain.state_dict(), rtol=0, atol=0)


def test_recurrent_batch_norm() -> None:
    """Checkpointed once, and a step that is not finite leaves the others' rows alone."""
    layer, plain = (normwise.LSTM(3, 4, norm="batch", num_stat_steps=5) for _ in range(2))
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(5, 6, 3, requires_grad=True)
    y, _ = checkpoint(layer, x, use_reentrant=False)
    y.backward(torch.randn_like(y))
    plain(x)
    torch.testing.assert_close(dict(layer.named_buffers()), dict(plain.named_buffers()))
    spoilt = x.detach().clone()
    spoilt[3, 1] = torch.nan
    before = {name: t.clone() for name, t in layer.named_buffers()}
    layer(spoilt)
    for name, t in layer.named_buffers():
        assert t.isfinite().all(), name
        if "_ih" in name:  # of the inputs alone; the states carry NaN into later steps
            assert torch.equal(t[3], before[name][3])
            assert not torch.equal(t[4], before[name][4])
        assert not torch.equal(t[:3], before[name][:3])


# --- torch.compile and functional_call -----------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("momentum", [0.1, None])
def test_compiled_in_one_graph(make: Make, momentum: float | None) -> None:
    """torch.nn reads the value of its counter for a cumulative average, which breaks the graph."""
    torch._dynamo.reset()
    layer, eager = make(3, momentum=momentum), nn.BatchNorm1d(3, momentum=momentum)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    batches = [torch.randn(8, 3) for _ in range(3)]
    if momentum is None and not is_ours(make):
        with pytest.raises(torch._dynamo.exc.TorchDynamoException):
            compiled(batches[0])
        return
    for x in batches:
        compiled(x), eager(x)
    for name, t in averages(eager).items():
        assert_close(getattr(layer, name), t.double(), count=8, scale=2.0)
    assert layer.num_batches_tracked == 3


@pytest.mark.parametrize("transform", [False, True], ids=["plain", "torch.func.grad"])
def test_functional_call_moves_the_buffers_that_it_is_given(transform: bool) -> None:
    layer, plain = normwise.BatchNorm1d(3, momentum=None), nn.BatchNorm1d(3, momentum=None)
    own = copy.deepcopy(dict(layer.named_buffers()))
    given = {k: t.clone() for k, t in layer.named_buffers()}
    buffers = {k: t for k, t in given.items() if k not in ("weight", "bias")}
    parameters = {k: t.detach().clone() for k, t in layer.named_parameters()}

    def loss(parameters: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, (parameters, buffers), (x,)).pow(3).sum()

    for _ in range(2):
        x = torch.randn(8, 3)
        (torch.func.grad(loss) if transform else loss)(parameters, buffers, x)
        plain(x)
    for name, t in plain.state_dict().items():
        if name in buffers:
            assert_close(buffers[name].double(), t.double(), dtype=torch.float32, count=8, name=name)
    torch.testing.assert_close(dict(layer.named_buffers()), own, rtol=0, atol=0)
