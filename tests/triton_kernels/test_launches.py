"""What calls cost on a GPU with Triton, counted without one: launches beside torch.nn's, and no wait for the host; and
what the kernel that moves running averages in one launch does to them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import normwise
from normwise.backends.protocol import LengthsRequest, Moments, RunningStatsRequest
from normwise.backends.triton.running_stats import supports, update, update_over_samples
from normwise.ops import dispatch
from normwise.ops.norm import running_stats
from support.backends import DTYPES
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
)
from support.tolerances import assert_close

# What numpy says of the numbers that are not finite.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")


@pytest.fixture(autouse=True)
def fresh_memory_of_nan() -> None:
    """Not for every test here: to fill memory is a launch."""


# Launches forward and backward of what torch.nn has not; lengths are made into a mask by one. docs/gpu-launches.md has
# the table.
LIMITS = {
    "batch, mask": (4, 4),
    "batch, lengths": (5, 4),
    "batch, mask, evaluation": (4, 3),
    "group, mask": (3, 4),
    "instance, mask": (3, 4),
    "instance, lengths, averages": (5, 4),
    "ghost batches": (27, 6),
    "ghost batches, mask": (31, 9),
    "renorm": (29, 5),
}


@pytest.mark.parametrize("call", LIMITS)
def test_a_call_takes_no_more_launches_than_its_limit(call: str) -> None:
    forward, backward = counted(call)
    assert forward.count <= LIMITS[call][0], forward.names
    assert backward.count <= LIMITS[call][1], backward.names


# Where Triton is forced: 1 + scale, and the kernel; of a gain a sum of sums too.
FORCED = {"layer, scale and shift": (2, 1), "rms, gate": (1, 2)}


@pytest.mark.parametrize("call", FORCED)
def test_scale_shift_and_gate_are_in_the_norms_launch_where_triton_is_forced(call: str) -> None:
    with normwise.backend("triton"):
        forward, backward = counted(call)
    assert forward.count <= FORCED[call][0], forward.names
    assert backward.count <= FORCED[call][1], backward.names


@pytest.mark.parametrize("call", TORCHS)
def test_a_norm_that_torch_has_takes_no_more_launches_than_torchs(call: str) -> None:
    ours, torchs = counted(call), counted_of_torch(call)
    assert ours[0].count <= torchs[0].count, (ours[0].names, torchs[0].names)
    assert ours[1].count <= torchs[1].count, (ours[1].names, torchs[1].names)


@pytest.mark.parametrize("call", CALLS)
def test_no_usual_call_waits_for_the_host(call: str) -> None:
    forward, backward = counted(call)
    assert forward.count > 0
    assert forward.waits + backward.waits == {}


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("call", CALLS)
def test_what_a_gpu_would_compute_is_what_the_cpu_does(call: str) -> None:
    check_values(call)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_batch_that_is_not_finite_moves_nothing_and_is_counted(masked: bool, momentum: float | None) -> None:
    check_skipped(masked, momentum, 3)


def launched(call: Callable[[], object]) -> set[str]:
    with as_on_gpu(), Launches() as found:
        call()
    return set(found.names)


@pytest.mark.parametrize(
    ("call", "taken"),
    [
        (lambda: normwise.BatchNorm1d(C)(torch.randn(N, C)), True),
        (lambda: normwise.BatchNorm1d(C, dtype=torch.float64)(torch.randn(N, C, dtype=torch.float64)), True),
        (lambda: normwise.BatchNorm1d(C).bfloat16()(torch.randn(N, C).bfloat16()), True),
        (lambda: normwise.BatchNorm1d(C, affine=False)(torch.randn(N, C)), True),
        (lambda: normwise.BatchRenorm1d(C)(torch.randn(N, C)), True),
        (lambda: normwise.BatchNorm1d(C, track_running_stats=False)(torch.randn(N, C)), False),
        (lambda: normwise.BatchNorm1d(C).eval()(torch.randn(N, C)), False),
        (lambda: torch.vmap(normwise.BatchNorm1d(C, track_running_stats=False))(torch.randn(2, N, C)), False),
        (lambda: normwise.InstanceNorm1d(C, track_running_stats=True)(torch.randn(N, C, L)), False),
    ],
)
def test_one_launch_moves_the_averages_wherever_there_are_some(call: Callable[[], object], taken: bool) -> None:
    assert ("triton update_running" in launched(call)) == taken


@pytest.mark.parametrize("backend", ["aten", "reference"])
def test_where_another_backend_is_forced_none_of_tritons_kernels_runs(backend: str) -> None:
    with normwise.backend(backend):
        names = launched(lambda: normwise.BatchNorm1d(C)(torch.randn(N, C, L)))
    assert not any("triton" in name for name in names)


def test_a_mask_on_a_gpu_is_tritons_and_the_reason_says_why() -> None:
    from normwise.backends.protocol import NormConfig, NormRequest

    request = NormRequest(
        NormConfig("group_norm", "groups", 1e-5, groups=4), torch.randn(N, C, L), mask=torch.ones(N, 1, L).bool()
    )
    assert dispatch.resolve(request).backend.name == "cpu"
    with as_on_gpu():
        backend, reason = dispatch.resolve(request)
    assert backend.name == "triton"
    assert "dozens" in reason


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8], ids=str)
@pytest.mark.parametrize("steps", [0, 1, 10, 1500])
def test_lengths_become_a_mask_in_one_launch(steps: int, dtype: torch.dtype) -> None:
    """Strided ones too; what lies outside of [0, steps] is taken for the nearest that does not."""
    lengths = torch.tensor([0, 3, 200, 5, steps if steps < 256 else 7, 9], dtype=dtype)[::2]
    request = LengthsRequest(lengths, steps)
    with as_on_gpu(), Launches() as found:
        kernel = dispatch.lengths_kernel(request)
        assert kernel is not None
        valid = kernel(request)
    assert found.count == (steps > 0)
    assert torch.equal(valid, torch.arange(steps) < lengths[:, None])
    assert dispatch.lengths_kernel(request) is None  # on the CPU
    with as_on_gpu(), normwise.backend("aten"):
        assert dispatch.lengths_kernel(request) is None


def averages(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(C).to(dtype), (torch.rand(C) + 0.5).to(dtype), torch.tensor(4)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("momentum", [0.3, 0, 1, torch.tensor(0.25), None], ids=str)
@pytest.mark.parametrize("saved", ["var", "rstd"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernel_moves_averages_as_they_are_defined(
    dtype: torch.dtype, saved: str, momentum: float | Tensor | None
) -> None:
    """By a variance, and by the reciprocal deviation that cuDNN saves, of averages in any dtype; counts of no element
    and of one; twice, where the second update finds the first."""
    eps, mean, var = 1e-3, torch.randn(C) * 3, torch.rand(C) * 4
    count = torch.full((C,), 80.0)
    if saved == "var":
        count[0], count[1] = 0, 1
    mine = averages(dtype)
    truth = mine[0].double(), mine[1].double()
    for step in (4, 5):
        given = {"var": var, "count": count} if saved == "var" else {"rstd": (var + eps).rsqrt(), "count": 80}
        request = RunningStatsRequest(*mine, momentum, mean, **given, eps=eps)
        assert supports(request) is None
        assert update(request)
        weight = 1 / (step + 1) if momentum is None else float(momentum)
        running_stats.update_averages(*truth, Moments(mean.double(), var.double(), count.double()), weight)
    assert mine[2] == 6
    for ours, expected in zip(mine, truth, strict=False):
        held_to = max(dtype, torch.float32, key=lambda d: torch.finfo(d).eps)
        assert_close(ours, expected, kind="composed", dtype=held_to, count=C, scale=8.0)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("momentum", [0.3, torch.tensor(0.25)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_samples_move_averages_by_the_mean_of_those_that_have_moments(
    dtype: torch.dtype, momentum: float | Tensor
) -> None:
    """Counts of one sample for all channels and of each channel; more channels than one program has."""
    channels = 131
    mean, var, count = torch.randn(5, channels) * 3, torch.rand(5, channels) * 4, torch.randint(2, 9, (5, channels))
    count[0], count[1] = 0, 1
    count[:, 3] = 0
    count[:, 130] = 1
    mean[2, 1], var[2, 2], mean[:, 4] = torch.nan, torch.inf, -torch.inf
    for counts in (count, count[:, :1].expand(-1, channels)):
        mine = torch.randn(channels).to(dtype), (torch.rand(channels) + 0.5).to(dtype)
        truth = mine[0].double(), mine[1].double()
        request = RunningStatsRequest(*mine, None, momentum, mean, var, counts)
        assert supports(request) is None
        update_over_samples(request)
        running_stats.update_over_samples(*truth, Moments(mean.double(), var.double(), counts), float(momentum))
        for ours, expected in zip(mine, truth, strict=True):
            held_to = max(dtype, torch.float32, key=lambda d: torch.finfo(d).eps)
            assert_close(ours, expected, kind="composed", dtype=held_to, count=channels, scale=8.0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["mean", "rstd"])
def test_the_kernel_moves_nothing_if_anything_is_not_finite(where: str, bad: float) -> None:
    if where == "rstd":  # 0 is that of an infinite variance
        bad = torch.nan if bad != bad else 0.0
    for at in (0, 1500):  # in another block than the others
        batch = {"mean": torch.zeros(1501), "rstd": torch.ones(1501)}
        batch[where][at] = bad
        mine = torch.randn(1501), torch.rand(1501), torch.tensor(3)
        before = [t.clone() for t in mine]
        assert not update(RunningStatsRequest(*mine, 0.1, **batch, count=9, eps=1e-5))
        assert all(torch.equal(new, old) for new, old in zip(mine, before, strict=True))


def test_a_variance_of_zero_stays_one() -> None:
    """1 / rstd^2 - eps of a constant is a rounding, which may be negative."""
    for eps in (1e-5, 1e-3, 0.1, 1e-12):
        mine = torch.zeros(C), torch.zeros(C), torch.tensor(0)
        rstd = torch.full((C,), eps).rsqrt()
        assert update(RunningStatsRequest(*mine, 1.0, torch.ones(C), rstd=rstd, count=9, eps=eps))
        assert bool((mine[1] >= 0).all())
        assert_close(mine[1], torch.zeros(C), count=1, scale=eps)


def test_what_a_graph_saved_of_the_averages_is_known_to_have_changed() -> None:
    layer, x = normwise.BatchNorm1d(C), torch.randn(N, C, L, requires_grad=True)
    with as_on_gpu():
        squared = (x.detach() * layer.running_mean.view(1, C, 1).requires_grad_()).pow(2)
        layer.running_mean.requires_grad_(False)
        version = layer.running_mean._version
        layer(x)
    assert layer.running_mean._version == version + 1
    assert squared.requires_grad


def test_averages_that_cannot_be_written_are_refused_as_ever() -> None:
    layer = normwise.BatchNorm1d(C)
    layer.running_mean = torch.zeros(1).expand(C)
    with as_on_gpu(), pytest.raises(RuntimeError, match="single memory location"):
        layer(torch.randn(N, C, L))


def test_a_forward_that_is_run_again_moves_the_averages_once() -> None:
    for momentum in (0.1, None):
        net = nn.Sequential(normwise.BatchNorm1d(C, momentum=momentum), nn.ReLU())
        x = torch.randn(N, C, L, requires_grad=True)
        with as_on_gpu():
            y = checkpoint(net, x, use_reentrant=False)
            before = [b.clone() for b in net.buffers()]
            assert int(net[0].num_batches_tracked) == 1
            y.backward(torch.randn_like(y))
        assert all(torch.equal(new, old) for new, old in zip(net.buffers(), before, strict=True))


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"running_var": torch.ones(2 * C)[::2]}, "contiguous"),
        ({"running_mean": torch.ones(C).int()}, "dtype"),
        ({"num_batches_tracked": torch.tensor(1.0)}, "int64"),
        ({"momentum": torch.empty((), device="meta")}, "one device"),
    ],
)
def test_what_the_kernel_cannot_take_it_refuses_with_the_reason(changed: dict[str, Tensor], reason: str) -> None:
    request = RunningStatsRequest(*averages(torch.float32), 0.1)
    assert supports(request) is None
    assert reason in str(supports(request._replace(**changed)))
