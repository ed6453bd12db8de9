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


# Tiles of planes side by side, the last of them smaller; more samples than a block of sums has rows.
SMALL_PLANES = [(8, 330, 5, 5), (17, 530, 3, 3), (300, 260, 2, 2), (9, 72, 32), (10, 200, 7, 9)]


@pytest.mark.parametrize("shape", SMALL_PLANES, ids=str)
@pytest.mark.parametrize("dtype", truth.DTYPES)
def test_small_planes_match_the_float64_formula(isa: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    check_channels(shape, dtype, threads=3)
    check_channels(shape, dtype, act="relu", residual=True, offset=1)
    check_channels(shape, dtype, training=False, by_sample=True)
    check_channels(shape, dtype, act="silu", by_sample=True)


@pytest.mark.parametrize("act", ["mish", "gelu", "leaky_relu", "relu6"])
def test_small_planes_go_with_any_activation(isa: str, act: str) -> None:
    check_channels((8, 330, 5, 5), torch.float32, act=act, residual=True)


def test_small_planes_around_1e4_lose_no_precision(isa: str) -> None:
    x = torch.randn(64, 256, 4, 4) + 1e4
    x[:32] += 1  # samples whose means differ
    y, stats, _ = channels_forward(x, None, None, None, None, True, MOMENTUM, EPS)
    z, mean, rstd = truth.standardize(x.double(), [0, 2, 3], None, EPS)
    assert_close(y, z, count=1)
    assert_close(stats[0], mean.reshape(-1), dtype=torch.float32, count=1)
    assert_close(stats[1], rstd.reshape(-1), dtype=torch.float32, count=1)


@pytest.mark.parametrize("by_sample", [False, True])
def test_small_planes_give_the_same_bits_on_any_number_of_threads(isa: str, by_sample: bool) -> None:
    shape = (16, 330, 5, 5)
    x, dy = torch.randn(2, *shape).unbind()
    gain, bias = torch.randn(2, *((16, 330, 1, 1) if by_sample else (330,))).unbind()
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        y, stats, _ = channels_forward(x, None, None, gain, bias, True, MOMENTUM, EPS, act="relu")
        found.append((y, stats, *channels_backward(dy, x, stats, gain, bias, True, act="relu")[:3]))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("shape", [*SHAPES, (7, 40, 3, 3), (3, 5, 700), (9, 16, 1, 1), (600, 40)], ids=str)
@pytest.mark.parametrize("dtype", truth.DTYPES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_each_sample_may_have_a_gain_and_bias(
    isa: str, dtype: torch.dtype, shape: tuple[int, ...], channels_last: bool
) -> None:
    check_channels(shape, dtype, by_sample=True, channels_last=channels_last)
    check_channels(shape, dtype, by_sample=True, channels_last=channels_last, training=False, act="relu")


@pytest.mark.parametrize("act", [None, "relu", "silu", "gelu", "mish"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_gains_of_samples_go_with_mask_residual_and_activation(
    isa: str, act: str | None, masked: bool, residual: bool, channels_last: bool
) -> None:
    for shape in ((4, 6, 5, 7), (33, 19), (5, 24, 3, 3)):
        options = {"act": act, "masked": masked, "residual": residual, "channels_last": channels_last}
        check_channels(shape, torch.float32, by_sample=True, **options)


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
@pytest.mark.parametrize("shape", [(3, 2, 9001), (5, 40, 321), (4099, 33), (64, 40, 4, 4)], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_gains_of_samples_match_the_formula_on_any_number_of_threads(
    threads: int, shape: tuple[int, ...], channels_last: bool
) -> None:
    check_channels(shape, torch.float32, threads=threads, channels_last=channels_last, by_sample=True)


@pytest.mark.parametrize("channels_last", [False, True])
def test_an_empty_batch_gives_gains_of_samples_a_gradient_of_zero(isa: str, channels_last: bool) -> None:
    x, gain = torch.randn(2, 3, 0), torch.randn(2, 3, 1)
    x = x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x
    _, stats, _ = channels_forward(x, None, None, gain, gain, True, MOMENTUM, EPS)
    _, dweight, dbias, _ = channels_backward(x, x, stats, gain, gain, True)
    assert torch.equal(dweight, torch.zeros_like(gain))
    assert torch.equal(dbias, torch.zeros_like(gain))


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
