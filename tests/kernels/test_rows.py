"""LayerNorm and RMSNorm kernels against float64 formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from support import kernel_truth as truth
from support.kernel_calls import rows_backward, rows_forward
from support.kernel_checks import EPS, check_rows
from support.tolerances import assert_close


@pytest.mark.parametrize("cols", [1, 3, 7, 16, 63, 256, 1023, 5000])
@pytest.mark.parametrize("dtype", truth.DTYPES)
@pytest.mark.parametrize("center", [True, False])
def test_any_width_matches_the_float64_formula(isa: str, dtype: torch.dtype, cols: int, center: bool) -> None:
    check_rows(7, cols, dtype, center=center)


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 5, 1023])
@pytest.mark.parametrize("dtype", truth.DTYPES)
def test_any_number_of_rows_matches_the_formula(isa: str, dtype: torch.dtype, rows: int) -> None:
    check_rows(rows, 17, dtype)


@pytest.mark.parametrize("act", truth.ACTS)
@pytest.mark.parametrize("dtype", truth.DTYPES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_mask_residual_and_activation_are_fused(
    isa: str, dtype: torch.dtype, act: str | None, masked: bool, residual: bool
) -> None:
    check_rows(37, 63, dtype, act=act, masked=masked, residual=residual, dsum=residual)


@pytest.mark.parametrize("act", truth.FURTHER_ACTS)
@pytest.mark.parametrize("dtype", truth.DTYPES)
def test_further_activations_are_fused(isa: str, dtype: torch.dtype, act: str) -> None:
    check_rows(37, 63, dtype, act=act)
    check_rows(9, 600, dtype, act=act, masked=True, residual=True, dsum=True)


@pytest.mark.parametrize("center", [True, False])
def test_no_gain_and_no_bias(isa: str, center: bool) -> None:
    check_rows(9, 63, torch.float32, affine=False, act="gelu", center=center)


@pytest.mark.parametrize("offset", [1, 2, 3])
@pytest.mark.parametrize("dtype", truth.DTYPES)
def test_storage_may_be_unaligned(isa: str, dtype: torch.dtype, offset: int) -> None:
    check_rows(5, 100, dtype, offset=offset)


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
def test_any_number_of_threads_matches_the_formula(threads: int) -> None:
    check_rows(301, 129, torch.float32, threads=threads, masked=True)


def test_strided_input_and_expanded_gradient() -> None:
    x = torch.randn(6, 40)[:, ::2]
    dy = torch.randn(6, 1).expand(6, 20)
    out = rows_forward(x, 20, None, None, EPS)
    ds, *_ = rows_backward(dy, x, out.stats, 20, None, None)
    s = truth.leaf(x)
    z, *_ = truth.standardize(s, [1], None, EPS)
    assert_close(out.y, z, count=20)
    assert_close(ds, torch.autograd.grad(z, s, dy.double())[0], kind="grad", count=20, scale=1.0)


def test_a_mean_of_1e4_loses_no_precision(isa: str) -> None:
    """float32 can hold a mean near 1e4 to 5e-4 only; the kernel keeps the rest of it apart."""
    x = torch.randn(16, 768) + 1e4
    out = rows_forward(x, 768, None, None, EPS)
    s = truth.leaf(x)
    z, *_ = truth.standardize(s, [1], None, EPS)
    assert_close(out.y, z, count=1)
    dy = torch.randn(16, 768)
    ds, *_ = rows_backward(dy, x, out.stats, 768, None, None)
    assert_close(ds, torch.autograd.grad(z, s, dy.double())[0], kind="grad", count=1)


def test_long_sums_lose_no_precision(isa: str) -> None:
    """Gain and bias gradients over 1e5 rows: a running float32 sum would lose three digits."""
    x, dy = torch.randn(100_000, 8), torch.rand(100_000, 8) + 1
    out = rows_forward(x, 8, torch.ones(8), torch.zeros(8), EPS)
    _, _, dbias = rows_backward(dy, x, out.stats, 8, torch.ones(8), torch.zeros(8))
    assert_close(dbias, dy.double().sum(0), kind="grad", count=1)


def test_nan_stays_in_its_row(isa: str) -> None:
    x = torch.randn(4, 33)
    x[1, 5] = float("nan")
    y = rows_forward(x, 33, None, None, EPS).y
    assert y[1].isnan().all()
    assert not y[[0, 2, 3]].isnan().any()


def test_bfloat16_rounds_to_nearest_even_and_keeps_nan(isa: str) -> None:
    x = torch.randn(64, 31).to(torch.bfloat16)
    x[3, 3] = float("nan")
    zero = torch.zeros_like(x)
    s = rows_forward(x, 31, None, None, EPS, residual=zero).sum
    assert torch.equal(s.view(torch.int16)[:3], x.view(torch.int16)[:3])
    assert s[3, 3].isnan()
    third: Tensor = torch.full_like(x, 1 / 3)
    summed = rows_forward(x, 31, None, None, EPS, residual=third).sum
    assert torch.equal(summed[:3], (x + third)[:3])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: rows_forward(x, 6, torch.ones(5), None, EPS), "6 elements"),
        (lambda x: rows_forward(x, 6, None, None, EPS, residual=x.double()), "like the input"),
        (lambda x: rows_forward(x, 6, None, None, EPS, mask=torch.ones(4)), "expected a bool mask"),
    ],
)
def test_wrong_arguments_are_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.randn(4, 6))
