"""GroupNorm and InstanceNorm kernels against float64 formulas."""

from __future__ import annotations

from math import prod

import pytest
import torch

import kernel_truth as truth
from normwise.kernels import cpu
from tolerances import assert_close

EPS = 1e-5


def check(
    shape: tuple[int, ...],
    groups: int,
    dtype: torch.dtype,
    *,
    act: str | None = None,
    residual: bool = False,
    masked: bool = False,
    affine: bool = True,
    offset: int = 0,
    threads: int = 1,
) -> None:
    """One call forward and backward, every output against the truth."""
    torch.set_num_threads(threads)
    batch, channels, positions = shape[0], shape[1], prod(shape[2:])
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, dy = (truth.tensor(*shape, dtype=dtype, offset=offset) for _ in range(2))
    r = truth.tensor(*shape, dtype=dtype) if residual else None
    weight, bias = torch.randn(2, channels).to(dtype) if affine else (None, None)
    mask, valid = None, None
    if masked:
        mask = torch.rand(batch, *shape[2:]) < 0.6
        mask[0] = False  # a sample without a valid position
        valid = mask.unsqueeze(1).expand(shape)
        x, dy = torch.where(valid, x, float("nan")), torch.where(valid, dy, float("inf"))

    settings = {"act": act, "residual": r, "mask": mask}
    y, stats = cpu.groups_forward(x, groups, weight, bias, EPS, **settings)
    got = cpu.groups_backward(dy, x, stats, groups, weight, bias, **settings)

    s, w, b, rd = (truth.leaf(t) for t in (x, weight, bias, r))
    by_group = (batch, groups, channels // groups, positions)
    keep = None if valid is None else valid.reshape(by_group)
    z, mean, rstd = truth.standardize(s.reshape(by_group), [2, 3], keep, EPS)
    z = z.reshape(shape)
    if w is not None:
        view = (1, channels, *(1,) * (len(shape) - 2))
        z = z * w.view(view) + b.view(view)
    expected_y = truth.activate(z if rd is None else z + rd, act, valid)
    upstream = dy.double() if valid is None else torch.where(valid, dy.double(), 0)
    leaves = {"dx": s, "dweight": w, "dbias": b, "dresidual": rd}
    leaves = {name: t for name, t in leaves.items() if t is not None}
    expected = dict(zip(leaves, torch.autograd.grad(expected_y, list(leaves.values()), upstream), strict=True))

    count = max(batch, channels // groups) * positions
    assert_close(y, expected_y, count=count, name="y")
    empty = torch.zeros_like(mean) if keep is None else (keep.sum([2, 3], keepdim=True) == 0).double()
    assert_close(stats[0], mean.reshape(-1), dtype=wide, count=count, name="mean")
    assert_close(stats[1], (rstd * (1 - empty)).reshape(-1), dtype=wide, count=count, name="rstd")
    scale = float(upstream.abs().max() * rstd.detach().max()) * (1.0 if w is None else float(weight.abs().max()))
    for name, g in zip(("dx", "dweight", "dbias", "dresidual"), got, strict=True):
        if name not in expected:
            assert g is None
            continue
        held_to = wide if name in ("dweight", "dbias") else dtype
        size = {"dx": scale, "dweight": float(upstream.abs().max())}.get(name)
        assert_close(g, expected[name], kind="grad", dtype=held_to, count=count, scale=size, name=name)


@pytest.mark.parametrize(
    ("shape", "groups"),
    [((2, 6, 5, 7), 3), ((3, 4, 1023), 4), ((1, 6, 63), 1), ((5, 8, 1), 2), ((2, 4, 9), 2), ((1, 2, 5000), 2)],
    ids=str,
)
@pytest.mark.parametrize("dtype", truth.DTYPES)
@pytest.mark.parametrize("masked", [False, True])
def test_shapes(isa: str, dtype: torch.dtype, shape: tuple[int, ...], groups: int, masked: bool) -> None:
    check(shape, groups, dtype, masked=masked)


@pytest.mark.parametrize("act", truth.ACTS)
@pytest.mark.parametrize("dtype", truth.DTYPES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_fused_forms(isa: str, dtype: torch.dtype, act: str | None, masked: bool, residual: bool) -> None:
    check((3, 6, 37), 2, dtype, act=act, masked=masked, residual=residual)


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
@pytest.mark.parametrize("groups", [1, 12])
def test_threads(threads: int, groups: int) -> None:
    check((5, 12, 999), groups, torch.float32, threads=threads)


@pytest.mark.parametrize("offset", [1, 3])
def test_unaligned_storage(isa: str, offset: int) -> None:
    check((2, 6, 50), 3, torch.float32, offset=offset)
    check((2, 6, 50), 6, torch.bfloat16, offset=offset, affine=False)


@pytest.mark.parametrize("shape", [(0, 6, 5), (2, 6, 0)], ids=str)
def test_empty(isa: str, shape: tuple[int, ...]) -> None:
    x, weight = torch.randn(shape), torch.ones(6)
    y, stats = cpu.groups_forward(x, 2, weight, None, EPS)
    dx, dweight, *_ = cpu.groups_backward(x, x, stats, 2, weight, None)
    assert y.shape == dx.shape == shape
    assert torch.equal(dweight, torch.zeros(6))


def test_a_mean_of_1e4_costs_no_digits(isa: str) -> None:
    x = torch.randn(4, 8, 1024) + 1e4
    y, _ = cpu.groups_forward(x, 2, None, None, EPS)
    z, *_ = truth.standardize(x.double().view(4, 2, 4, 1024), [2, 3], None, EPS)
    assert_close(y, z.view(x.shape), count=1)
