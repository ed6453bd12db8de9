"""GroupNorm and InstanceNorm kernels against float64 formulas, in both memory layouts."""

from __future__ import annotations

import pytest
import torch

from support import kernel_truth as truth
from support.kernel_calls import groups_backward, groups_forward
from support.kernel_checks import EPS, check_groups
from support.tolerances import assert_close

each_layout = pytest.mark.parametrize("channels_last", [False, True])
SHAPES = [
    ((2, 6, 5, 7), 3),
    ((3, 4, 1023), 4),
    ((1, 6, 63), 1),
    ((5, 8, 1), 2),
    ((2, 4, 9), 2),
    ((1, 2, 5000), 2),
    ((3, 130, 20), 10),
    ((4, 12), 3),
]


@pytest.mark.parametrize(("shape", "groups"), SHAPES, ids=str)
@pytest.mark.parametrize("dtype", truth.DTYPES)
@pytest.mark.parametrize("masked", [False, True])
@each_layout
def test_any_shape_matches_the_float64_formula(
    isa: str, dtype: torch.dtype, shape: tuple[int, ...], groups: int, masked: bool, channels_last: bool
) -> None:
    check_groups(shape, groups, dtype, masked=masked, channels_last=channels_last)


@pytest.mark.parametrize("act", truth.ACTS)
@pytest.mark.parametrize("dtype", truth.DTYPES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@each_layout
def test_mask_residual_and_activation_are_fused(
    isa: str, dtype: torch.dtype, act: str | None, masked: bool, residual: bool, channels_last: bool
) -> None:
    check_groups((3, 6, 37), 2, dtype, act=act, masked=masked, residual=residual, channels_last=channels_last)


@pytest.mark.parametrize("act", truth.FURTHER_ACTS)
@pytest.mark.parametrize("dtype", truth.DTYPES)
@each_layout
def test_further_activations_are_fused(isa: str, dtype: torch.dtype, act: str, channels_last: bool) -> None:
    check_groups((3, 6, 37), 2, dtype, act=act, masked=True, residual=True, channels_last=channels_last)


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
@pytest.mark.parametrize(("batch", "groups"), [(5, 1), (5, 12), (1, 1), (1, 12)])
@each_layout
def test_any_number_of_threads_matches_the_formula(threads: int, batch: int, groups: int, channels_last: bool) -> None:
    check_groups((batch, 12, 3001), groups, torch.float32, threads=threads, masked=True, channels_last=channels_last)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(1, 6, 9001), (3, 6, 5001), (8, 6, 1001)], ids=str)
@each_layout
def test_one_result_for_any_number_of_threads(shape: tuple[int, ...], masked: bool, channels_last: bool) -> None:
    """Bit for bit, whether a thread has whole groups and samples, or a share of each."""
    x, dy = (truth.tensor(*shape, dtype=torch.float32, channels_last=channels_last) for _ in range(2))
    weight, bias = torch.randn(2, 6)
    mask = torch.rand(shape[0], shape[2]) < 0.6 if masked else None
    found = []
    for threads in (1, 2, 3, 4, 7):
        torch.set_num_threads(threads)
        y, stats = groups_forward(x, 2, weight, bias, EPS, act="silu", mask=mask)
        found.append([y, *groups_backward(dy, x, stats, 2, weight, bias, act="silu", mask=mask)[:3]])
    for more in found[1:]:
        assert all(map(torch.equal, more, found[0]))


@pytest.mark.parametrize("offset", [1, 3])
@each_layout
def test_storage_may_be_unaligned(isa: str, offset: int, channels_last: bool) -> None:
    check_groups((2, 6, 50), 3, torch.float32, offset=offset, channels_last=channels_last)
    check_groups((2, 6, 50), 6, torch.bfloat16, offset=offset, affine=False, channels_last=channels_last)


@pytest.mark.parametrize("shape", [(0, 6, 5), (2, 6, 0)], ids=str)
@each_layout
def test_empty_input_gives_zero_gradients(isa: str, shape: tuple[int, ...], channels_last: bool) -> None:
    x, weight = truth.tensor(*shape, dtype=torch.float32, channels_last=channels_last), torch.ones(6)
    y, stats = groups_forward(x, 2, weight, None, EPS)
    dx, dweight, *_ = groups_backward(x, x, stats, 2, weight, None)
    assert y.shape == dx.shape == shape
    assert torch.equal(dweight, torch.zeros(6))


@pytest.mark.parametrize("residual", [False, True])
def test_other_strides_are_copied(residual: bool) -> None:
    """An input with gaps, and a residual in the other layout."""
    x = torch.randn(6, 8, 10)[:, ::2]
    r = truth.tensor(6, 4, 10, dtype=torch.float32, channels_last=True) if residual else None
    y, _ = groups_forward(x, 2, None, None, EPS, residual=r)
    z, *_ = truth.standardize(x.double().reshape(6, 2, 2, 10), [2, 3], None, EPS)
    z = z.view(x.shape)
    assert_close(y, z if r is None else z + r, count=20)


@each_layout
def test_a_mean_of_1e4_costs_no_digits(isa: str, channels_last: bool) -> None:
    x = truth.tensor(4, 8, 1024, dtype=torch.float32, channels_last=channels_last) + 1e4
    y, _ = groups_forward(x, 2, None, None, EPS)
    z, *_ = truth.standardize(x.double().reshape(4, 2, 4, 1024), [2, 3], None, EPS)
    assert_close(y, z.view(x.shape), count=1)
    assert (y.stride()[1] == 1) == channels_last


@each_layout
def test_sorted_input_does_not_cancel(isa: str, channels_last: bool) -> None:
    """Every block and channel has a mean far from the whole's."""
    x = torch.linspace(0, 1e4, 40_000).view(2, 4, 5000)
    x = x.transpose(1, 2).contiguous().transpose(1, 2) if channels_last else x
    _, stats = groups_forward(x, 2, None, None, EPS)
    _, mean, rstd = truth.standardize(x.double().reshape(2, 2, 2, 5000), [2, 3], None, EPS)
    assert_close(stats[0], mean.reshape(-1), dtype=torch.float32, count=1)
    assert_close(stats[1], rstd.reshape(-1), dtype=torch.float32, count=1)
