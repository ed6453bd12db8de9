"""Inputs whose squares leave float32, as an exploding net's do: the right numbers or NaN, and never zeros.

Zeros would let a step go on that GradScaler and torch.autograd.detect_anomaly stop. (torch's BatchNorm, GroupNorm,
InstanceNorm and RMSNorm make zeros of them.)
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normwise
from normwise.backends.cpu import library
from normwise.backends.cpu.library import ISA_LEVELS
from support.backends import without_kernels
from support.norm_cases import CASES, ROUNDED_BEFORE_GAIN, Case

EXTRA = [
    Case("BatchNorm1d", (64,), (300, 64)),
    Case("BatchNorm2d", (4,), (2, 4, 70, 70)),
    Case("LayerNorm", (64,), (300, 64)),
    Case("LayerNorm", (5000,), (3, 5000)),
    Case("RMSNorm", (64,), (300, 64)),
    Case("RMSNorm", (5000,), (3, 5000)),
    Case("GroupNorm", (2, 4), (2, 4, 70, 70)),
    Case("InstanceNorm2d", (4,), (2, 4, 70, 70)),
]
OURS_ALONE = [
    Case("BatchNorm1d", (4,), (6, 4, 5), {"virtual_batch_size": 3}),
    Case("BatchNorm2d", (4,), (3, 4, 5, 6), {"act": "silu"}),
    Case("BatchRenorm1d", (4,), (6, 4, 5)),
    Case("LayerNorm", (4,), (3, 4, 5), {"dim": 1, "act": "leaky_relu"}),
]


@contextlib.contextmanager
def way(name: str) -> Iterator[None]:
    """By the kernels of an instruction set, or by what is chosen without them, or by the reference."""
    if name in ISA_LEVELS:
        before = library.isa()
        library.use_isa(name)
        try:
            yield
        finally:
            library.use_isa(before)
    elif name == "without kernels":
        with without_kernels():
            yield
    else:
        with normwise.backend("reference"):
            yield


def levels() -> list[str]:
    if library.missing() is not None:
        return []
    before, found = library.isa(), []
    for level in ISA_LEVELS:
        with contextlib.suppress(ValueError):
            library.use_isa(level)
            found.append(level)
    library.use_isa(before)
    return found


WAYS = [*levels(), "without kernels", "reference"]


def check(layer: nn.Module, x: Tensor, **call: Any) -> None:
    exact = copy.deepcopy(layer).double()
    upstream = torch.randn(x.shape).to(x.dtype)
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = layer(leaf, **call)
    (grad,) = torch.autograd.grad(y, leaf, upstream)
    with normwise.backend("reference"):
        wide = x.double().requires_grad_()
        truth = exact(wide, **call)
        (slope,) = torch.autograd.grad(truth, wide, upstream.double())
    tolerance = 2e-2 if x.dtype == torch.bfloat16 else 1e-4
    for got, expected in ((y, truth), (grad * 1e20, slope * 1e20)):
        right = torch.isclose(
            got.double(), expected, rtol=tolerance, atol=tolerance * float(expected.detach().abs().max())
        )
        assert (right | got.isnan()).all()


@pytest.mark.filterwarnings("ignore:.*skipped an update")
@pytest.mark.parametrize("name", WAYS)
def test_every_layer(name: str) -> None:
    with way(name):
        for case in [*CASES, *ROUNDED_BEFORE_GAIN, *EXTRA, *OURS_ALONE]:
            shape = (4, 4, 6) if case.shape == (1, 4) else case.shape  # a batch of one row
            for dtype in (torch.float32, torch.bfloat16):
                x = (torch.randn(shape) * 1e20).to(dtype)
                check(case.ours().to(dtype), x)
                if len(shape) == 4 and "InstanceNorm" not in case.name:
                    check(case.ours(), x.float().contiguous(memory_format=torch.channels_last))


@pytest.mark.filterwarnings("ignore:.*skipped an update")
@pytest.mark.parametrize("name", WAYS)
def test_with_a_mask_and_a_residual(name: str) -> None:
    with way(name):
        for case in (*EXTRA[1:3], *EXTRA[6:]):
            x = torch.randn(case.shape) * 1e20
            channel = x.dim() - 1 if case.name == "LayerNorm" else 1
            mask = torch.rand([s for d, s in enumerate(x.shape) if d != channel]) < 0.7
            check(case.ours(), x, mask=mask)
            if case.name != "LayerNorm":
                check(case.ours(act="relu"), x, mask=mask, residual=torch.randn_like(x))


@pytest.mark.parametrize("name", WAYS)
def test_squares_that_leave_float64(name: str) -> None:
    with way(name):
        for layer in (normwise.LayerNorm(64), normwise.RMSNorm(64), normwise.GroupNorm(4, 64)):
            y = layer.double()(torch.randn(30, 64, dtype=torch.float64) * 1e200)
            assert y.isnan().all()
