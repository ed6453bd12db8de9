"""GroupNorm and InstanceNorm kernels against float64 formulas."""

from __future__ import annotations

import pytest
import torch

import kernel_truth as truth
from kernel_checks import EPS, check_groups
from normwise.kernels.groups import groups_backward, groups_forward
from tolerances import assert_close


@pytest.mark.parametrize(
    ("shape", "groups"),
    [((2, 6, 5, 7), 3), ((3, 4, 1023), 4), ((1, 6, 63), 1), ((5, 8, 1), 2), ((2, 4, 9), 2), ((1, 2, 5000), 2)],
    ids=str,
)
@pytest.mark.parametrize("dtype", truth.DTYPES)
@pytest.mark.parametrize("masked", [False, True])
def test_shapes(isa: str, dtype: torch.dtype, shape: tuple[int, ...], groups: int, masked: bool) -> None:
    check_groups(shape, groups, dtype, masked=masked)


@pytest.mark.parametrize("act", truth.ACTS)
@pytest.mark.parametrize("dtype", truth.DTYPES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_fused_forms(isa: str, dtype: torch.dtype, act: str | None, masked: bool, residual: bool) -> None:
    check_groups((3, 6, 37), 2, dtype, act=act, masked=masked, residual=residual)


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
@pytest.mark.parametrize("groups", [1, 12])
def test_threads(threads: int, groups: int) -> None:
    check_groups((5, 12, 999), groups, torch.float32, threads=threads)


@pytest.mark.parametrize("offset", [1, 3])
def test_unaligned_storage(isa: str, offset: int) -> None:
    check_groups((2, 6, 50), 3, torch.float32, offset=offset)
    check_groups((2, 6, 50), 6, torch.bfloat16, offset=offset, affine=False)


@pytest.mark.parametrize("shape", [(0, 6, 5), (2, 6, 0)], ids=str)
def test_empty(isa: str, shape: tuple[int, ...]) -> None:
    x, weight = torch.randn(shape), torch.ones(6)
    y, stats = groups_forward(x, 2, weight, None, EPS)
    dx, dweight, *_ = groups_backward(x, x, stats, 2, weight, None)
    assert y.shape == dx.shape == shape
    assert torch.equal(dweight, torch.zeros(6))


def test_a_mean_of_1e4_costs_no_digits(isa: str) -> None:
    x = torch.randn(4, 8, 1024) + 1e4
    y, _ = groups_forward(x, 2, None, None, EPS)
    z, *_ = truth.standardize(x.double().view(4, 2, 4, 1024), [2, 3], None, EPS)
    assert_close(y, z.view(x.shape), count=1)
