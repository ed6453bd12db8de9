"""LayerNorm and RMSNorm by the Triton kernels, against the reference in float64."""

from __future__ import annotations

import pytest
import torch

from normwise.backends.protocol import NormConfig, NormRequest
from normwise.backends.triton.norms import FAMILIES, supports
from support.backends import DTYPES
from support.kernel_truth import ACTS, FURTHER_ACTS
from support.tolerances import assert_close
from support.triton_checks import check


def some_rows(*shape: int) -> torch.Tensor:
    mask = torch.rand(*shape) < 0.6
    mask.view(-1)[:2] = torch.tensor([True, False])
    return mask


@pytest.mark.parametrize("cols", [0, 1, 2, 63, 256, 1023, 5000])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("center", [True, False])
def test_any_width(dtype: torch.dtype, cols: int, center: bool) -> None:
    check("features", (7, cols), dtype, center=center)


@pytest.mark.parametrize("rows", [0, 1, 2, 33, 1023])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_rows(dtype: torch.dtype, rows: int) -> None:
    check("features", (rows, 17), dtype)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", ["", "rows", "elements"])
@pytest.mark.parametrize("residual", [False, True])
def test_mask_residual_and_activation_are_fused(
    dtype: torch.dtype, act: str | None, masked: str, residual: bool
) -> None:
    mask = {"": None, "rows": some_rows(37, 1), "elements": some_rows(37, 63)}[masked]
    check("features", (37, 63), dtype, act=act, mask=mask, residual=residual, dtotal=residual)
    if act in (None, "gelu"):
        check("features", (37, 63), dtype, act=act, mask=mask, residual=residual, center=False)


@pytest.mark.parametrize("act", FURTHER_ACTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_further_activations_are_fused(dtype: torch.dtype, act: str) -> None:
    check("features", (37, 63), dtype, act=act, mask=some_rows(37, 1), residual=True)


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("weight", "bias"), [(False, False), (True, False), (False, True)])
def test_gain_and_bias_may_be_missing(center: bool, masked: bool, weight: bool, bias: bool) -> None:
    mask = some_rows(9, 1) if masked else None
    check("features", (9, 63), act="gelu", center=center, mask=mask, weight=weight, bias=bias)


@pytest.mark.parametrize("shape", [(6, 64), (6, 1), (6, 63)])
@pytest.mark.parametrize("center", [True, False])
def test_rows_without_a_valid_element_are_zero_and_get_no_gradient(shape: tuple[int, int], center: bool) -> None:
    check("features", shape, center=center, mask=torch.zeros(6, 1, dtype=torch.bool), act="silu")
    mask = torch.ones(shape, dtype=torch.bool)
    mask[2] = False
    check("features", shape, center=center, mask=mask, residual=True)


def test_several_axes_are_one_row() -> None:
    check("features", (3, 2, 5, 7), axes=2)
    check("features", (3, 2, 5, 7), axes=3, mask=some_rows(3, 2, 1, 7), center=False)
    check("features", (3, 2, 5, 7), axes=2, mask=some_rows(3, 1, 1, 1))
    check("features", (5,))


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_tensors(dtype: torch.dtype) -> None:
    check("features", (6, 63), dtype, layout="strided", residual=True, dtotal=True, mask=some_rows(6, 1))


def test_parameters_of_another_dtype_get_their_gradients_in_it() -> None:
    check("features", (6, 63), torch.bfloat16, parameter_dtype=torch.float32)
    check("features", (6, 63), torch.float32, parameter_dtype=torch.bfloat16)
    check("features", (6, 63), torch.float16, parameter_dtype=torch.float64, act="relu")


def test_a_mean_of_1e4_loses_no_precision() -> None:
    x = torch.randn(16, 768) + 1e4
    request = NormRequest(NormConfig("layer_norm", "features", 1e-5), x)
    out = FAMILIES["features"].forward(*request, True)
    s = x.double().requires_grad_()
    y = torch.nn.functional.layer_norm(s, (768,))
    assert_close(out.y, y, count=1)
    dy = torch.randn(16, 768)
    got = FAMILIES["features"].backward(request.config, out.total, None, None, None, None, out.stats, dy, None)
    assert_close(got.x, torch.autograd.grad(y, s, dy.double())[0], kind="grad", count=1)


def test_long_sums_lose_no_precision() -> None:
    """Gain and bias gradients over 1e5 rows: a running float32 sum would lose three digits."""
    x, dy, weight = torch.randn(100_000, 8), torch.rand(100_000, 8) + 1, torch.ones(8)
    request = NormRequest(NormConfig("layer_norm", "features", 1e-5), x, None, weight, weight)
    out = FAMILIES["features"].forward(*request, True)
    got = FAMILIES["features"].backward(request.config, x, None, weight, weight, None, out.stats, dy, None)
    assert_close(got.bias, dy.double().sum(0), kind="grad", count=1)


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize("act", [*ACTS, *FURTHER_ACTS])
def test_nan_stays_in_its_row(act: str | None) -> None:
    x = torch.randn(4, 33)
    x[1, 5] = float("nan")
    x[2, 5] = 3e38
    y = FAMILIES["features"].forward(*NormRequest(NormConfig("layer_norm", "features", 1e-5, act), x), False).y
    assert y[1].isnan().all()
    assert y[2].isnan().all()  # its variance is no float32: zeros would hide it
    assert y[[0, 3]].isfinite().all()


def test_the_same_bits_twice() -> None:
    x, dy, weight = torch.randn(600, 33), torch.randn(600, 33), torch.randn(33)
    request = NormRequest(NormConfig("layer_norm", "features", 1e-5, "gelu"), x, None, weight, weight)
    runs = []
    for _ in range(2):
        out = FAMILIES["features"].forward(*request, True)
        grads = FAMILIES["features"].backward(request.config, x, None, weight, weight, None, out.stats, dy, None)
        runs.append((out.y, grads.x, grads.weight, grads.bias))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_what_is_not_built_is_refused_with_the_reason() -> None:
    def reason(x: torch.Tensor, **of: object) -> str:
        return supports(NormRequest(NormConfig("layer_norm", "features", 1e-5), x, **of)) or "takes it"

    assert reason(torch.randn(2, 1 << 14)) == "takes it"
    assert "up to 16384 elements, not 16385" in reason(torch.randn(2, (1 << 14) + 1))
    assert "not mix an input of torch.float32 with a residual of torch.float64" in reason(
        torch.randn(2, 3), residual=torch.randn(2, 3).double()
    )
    assert "not an input of torch.complex64" in reason(torch.randn(2, 3).cfloat())
    assert "not a gain of torch.complex64" in reason(torch.randn(2, 3), weight=torch.randn(3).cfloat())
    assert "on one device, not on cpu and meta" in reason(torch.randn(2, 3), weight=torch.empty(3, device="meta"))
    assert "on a GPU, not on meta" in reason(torch.empty(2, 3, device="meta"))
