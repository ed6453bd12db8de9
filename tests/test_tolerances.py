from __future__ import annotations

import pytest
import torch

from support.devices import devices_and_dtypes
from support.tolerances import TABLE, assert_close

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize(("device", "dtype"), devices_and_dtypes())
def test_a_result_rounded_once_passes_and_a_slip_of_four_units_fails(device, dtype):
    exact = torch.randn(1000, dtype=torch.float64, device=device)
    rounded = exact.to(dtype)
    assert_close(rounded, exact)
    slip = 4 * max(TABLE[dtype, "forward"]) * exact.abs().max()
    with pytest.raises(AssertionError, match="forward"):
        assert_close(rounded.double() + slip, exact, dtype=dtype)


def test_float64_does_not_let_float32_arithmetic_pass():
    exact = torch.randn(1000, dtype=torch.float64)
    for kind in ("forward", "grad", "composed"):
        with pytest.raises(AssertionError, match=kind):
            assert_close(exact.float().double(), exact, kind=kind)


@pytest.mark.parametrize("dtype", DTYPES)
def test_kinds_only_loosen_in_order(dtype):
    forward, grad, composed = (TABLE[dtype, kind] for kind in ("forward", "grad", "composed"))
    assert forward.rtol <= grad.rtol <= composed.rtol
    assert forward.sum_tol <= grad.sum_tol <= composed.sum_tol


def test_small_results_get_no_allowance_from_an_absolute_floor():
    exact = torch.full((10,), 1e-9, dtype=torch.float64)
    with pytest.raises(AssertionError, match=r"scale=1e-09"):
        assert_close((exact * 1.0001).float(), exact)


def test_a_sum_in_float32_is_within_the_square_root_of_its_count():
    terms = torch.rand(1 << 16)
    walked = terms.cumsum(0)[-1]  # added one by one, unlike torch.sum
    assert_close(walked, terms.double().sum(), count=terms.numel())


def test_rounding_noise_around_an_exact_zero_needs_its_scale_named():
    noise, zero = torch.full((4,), 1e-7), torch.zeros(4)
    with pytest.raises(AssertionError, match="scale=0"):
        assert_close(noise, zero)
    assert_close(noise, zero, scale=1.0)


def test_nan_and_inf_must_stand_in_the_same_places():
    special = torch.tensor([float("nan"), float("inf"), 1.0])
    assert_close(special, special.double())
    with pytest.raises(AssertionError):
        assert_close(torch.tensor([1.0, float("inf"), 1.0]), special)


def test_shapes_must_agree():
    with pytest.raises(AssertionError, match="shape"):
        assert_close(torch.zeros(2, 1), torch.zeros(2))
