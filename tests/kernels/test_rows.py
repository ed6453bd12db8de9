"""LayerNorm and RMSNorm kernels against float64 formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from normwise.backends.protocol import Gate
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


@pytest.mark.parametrize("cols", [7, 600])
@pytest.mark.parametrize("dtype", truth.DTYPES)
def test_groups_of_rows_have_a_gain_and_bias_each(isa: str, dtype: torch.dtype, cols: int) -> None:
    for rows, groups in ((12, 1), (12, 3), (9, 9), (140, 2), (96, 48), (2, 1), (660, 2)):
        check_rows(rows, cols, dtype, groups=groups, threads=2)


@pytest.mark.parametrize("act", [None, "silu", "mish"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_gains_of_groups_with_mask_residual_and_activation(
    isa: str, act: str | None, masked: bool, residual: bool
) -> None:
    options = {"act": act, "masked": masked, "residual": residual, "dsum": residual}
    for groups, center in ((5, True), (35, False)):
        check_rows(35, 63, torch.float32, groups=groups, center=center, **options)
        check_rows(70, 40, torch.bfloat16, groups=groups, center=center, **options)


@pytest.mark.parametrize("gate_first", [True, False])
@pytest.mark.parametrize("dtype", truth.DTYPES)
@pytest.mark.parametrize("cols", [1, 7, 256, 1023])
def test_a_gate_before_and_behind_the_norm(isa: str, dtype: torch.dtype, cols: int, gate_first: bool) -> None:
    check_rows(7, cols, dtype, center=False, gate_first=gate_first)
    check_rows(70, cols, dtype, groups=2, gate_first=gate_first, threads=2)


@pytest.mark.parametrize("gate_act", ["sigmoid", "gelu", "relu", None])
@pytest.mark.parametrize("dtype", truth.DTYPES)
def test_activations_of_a_gate(isa: str, dtype: torch.dtype, gate_act: str | None) -> None:
    for gate_first in (True, False):
        check_rows(9, 63, dtype, gate_first=gate_first, gate_act=gate_act)


@pytest.mark.parametrize("act", truth.ACTIVATIONS)
@pytest.mark.parametrize("dtype", truth.DTYPES)
def test_an_activation_behind_a_gate_that_comes_first(isa: str, dtype: torch.dtype, act: str) -> None:
    check_rows(9, 63, dtype, gate_first=True, act=act)


@pytest.mark.parametrize("gate_first", [True, False])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", truth.DTYPES)
def test_a_gate_with_mask_and_residual(
    isa: str, dtype: torch.dtype, residual: bool, masked: bool, gate_first: bool
) -> None:
    options = {"masked": masked, "residual": residual, "dsum": residual, "gate_first": gate_first, "offset": 1}
    check_rows(37, 129, dtype, **options)
    check_rows(37, 129, dtype, affine=False, center=False, act="gelu" if gate_first else None, **options)


def test_a_kernel_refuses_an_activation_behind_a_gate_that_comes_last() -> None:
    gate = Gate(torch.randn(3, 8), "silu", first=False)
    with pytest.raises(ValueError, match="refused"):
        rows_forward(torch.randn(3, 8), 8, None, None, EPS, act="relu", gate=gate)


@pytest.mark.parametrize(("groups", "gate_first"), [(3, None), (600, None), (3, True), (1, False)])
def test_gains_of_groups_and_gates_do_not_depend_on_the_number_of_threads(groups: int, gate_first: bool | None) -> None:
    x, dy, values = torch.randn(3, 600, 130)
    weight, bias = torch.randn(2, groups, 1, 130)
    gate = None if gate_first is None else Gate(values, "silu", gate_first)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        out = rows_forward(x, 130, weight, bias, EPS, gate=gate)
        found.append([*out, *rows_backward(dy, x, out.stats, 130, weight, bias, gate=gate)])
    for others in found[1:]:
        for a, b in zip(found[0], others, strict=True):
            assert a is b is None or torch.equal(a, b)


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
    _, _, dbias, _ = rows_backward(dy, x, out.stats, 8, torch.ones(8), torch.zeros(8))
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
