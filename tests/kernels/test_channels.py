"""BatchNorm kernels against float64 formulas, in both memory layouts."""

from __future__ import annotations

import pytest
import torch

from support import kernel_truth as truth
from support.kernel_calls import channels_backward, channels_forward
from support.kernel_checks import EPS, MOMENTUM, check_channels
from support.tolerances import assert_close

SHAPES = [(4, 6, 5, 7), (2, 3, 1023), (3, 5, 63), (1, 1, 7), (5, 17, 16), (64, 7), (2, 130), (300, 3), (2, 1, 9000)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", truth.DTYPES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_any_shape_matches_the_float64_formula(
    isa: str, dtype: torch.dtype, shape: tuple[int, ...], channels_last: bool
) -> None:
    check_channels(shape, dtype, channels_last=channels_last)


@pytest.mark.parametrize("act", truth.ACTS)
@pytest.mark.parametrize("dtype", truth.DTYPES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(4, 6, 37), (33, 19)], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_mask_residual_and_activation_are_fused(
    isa: str, dtype: torch.dtype, act: str | None, masked: bool, shape: tuple[int, ...], channels_last: bool
) -> None:
    check_channels(shape, dtype, act=act, masked=masked, channels_last=channels_last)
    check_channels(shape, dtype, act=act, masked=masked, channels_last=channels_last, residual=True, training=False)


@pytest.mark.parametrize("act", truth.FURTHER_ACTS)
@pytest.mark.parametrize("dtype", truth.DTYPES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_further_activations_are_fused(isa: str, dtype: torch.dtype, act: str, channels_last: bool) -> None:
    check_channels((4, 6, 37), dtype, act=act, masked=True, channels_last=channels_last)
    check_channels((33, 19), dtype, act=act, channels_last=channels_last, residual=True, training=False)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_residual_is_fused_in_training(isa: str, residual: bool, masked: bool, channels_last: bool) -> None:
    check_channels(
        (3, 5, 4, 9), torch.float32, act="relu", masked=masked, residual=residual, channels_last=channels_last
    )
    check_channels(
        (3, 5, 4, 9), torch.float32, masked=masked, residual=residual, channels_last=channels_last, affine=False
    )


@pytest.mark.parametrize("offset", [1, 3])
@pytest.mark.parametrize("dtype", truth.DTYPES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_storage_may_be_unaligned(isa: str, dtype: torch.dtype, offset: int, channels_last: bool) -> None:
    check_channels((3, 20, 50), dtype, offset=offset, channels_last=channels_last)


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
@pytest.mark.parametrize("shape", [(3, 2, 9001), (5, 40, 321), (4099, 33)], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_any_number_of_threads_matches_the_formula(
    threads: int, shape: tuple[int, ...], channels_last: bool, masked: bool
) -> None:
    check_channels(shape, torch.float32, threads=threads, channels_last=channels_last, masked=masked)


@pytest.mark.parametrize("shape", [(2, 4, 500_000), (1_000_000, 4)], ids=str)
def test_a_million_elements_around_1e4_lose_no_precision(isa: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape) + 1e4
    y, stats, _ = channels_forward(x, None, None, None, None, True, MOMENTUM, EPS)
    dims = [0, *range(2, len(shape))]
    z, mean, rstd = truth.standardize(x.double(), dims, None, EPS)
    assert_close(y, z, count=1)
    assert_close(stats[0], mean.reshape(-1), dtype=torch.float32, count=1)
    assert_close(stats[1], rstd.reshape(-1), dtype=torch.float32, count=1)


@pytest.mark.parametrize("shape", [(40_000, 4), (4, 4, 10_000)], ids=str)
def test_sorted_input_does_not_cancel(isa: str, shape: tuple[int, ...]) -> None:
    """Every block has a mean far from the whole's: what shifts all sums by the first block's mean would lose."""
    x = torch.linspace(0, 1e4, 40_000).repeat_interleave(4).view(40_000, 4)
    if len(shape) > 2:
        x = x.view(4, 10_000, 4).movedim(-1, 1).contiguous()
    _, stats, _ = channels_forward(x, None, None, None, None, True, MOMENTUM, EPS)
    _, mean, rstd = truth.standardize(x.double(), [0, *range(2, len(shape))], None, EPS)
    assert_close(stats[0], mean.reshape(-1), dtype=torch.float32, count=1)
    assert_close(stats[1], rstd.reshape(-1), dtype=torch.float32, count=1)


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 5), (2, 3, 0)], ids=str)
def test_empty_batch_leaves_running_averages(isa: str, shape: tuple[int, ...]) -> None:
    running_mean, running_var = torch.ones(3), torch.full((3,), 2.0)
    x = torch.randn(shape)
    y, stats, _ = channels_forward(x, running_mean, running_var, None, None, True, MOMENTUM, EPS)
    dx, *_ = channels_backward(x, x, stats, None, None, True)
    assert y.shape == dx.shape == shape
    assert torch.equal(running_mean, torch.ones(3))
    assert torch.equal(running_var, torch.full((3,), 2.0))


def test_strided_input_is_copied() -> None:
    x = torch.randn(6, 8, 10)[:, ::2]
    y, _, _ = channels_forward(x, None, None, None, None, True, MOMENTUM, EPS)
    assert_close(y, truth.standardize(x.double(), [0, 2], None, EPS)[0], count=60)
