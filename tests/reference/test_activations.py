"""The activations of the fused forms: what they are in torch, and their derivatives through a norm."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from normwise.backends.activations import ACTIVATIONS
from normwise.backends.protocol import NormConfig
from normwise.backends.reference.norms import FAMILIES
from support.tolerances import assert_close

IN_TORCH = {name: getattr(F, name) for name in ACTIVATIONS if name != "gelu_tanh"}
IN_TORCH["gelu_tanh"] = lambda z: F.gelu(z, approximate="tanh")


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_what_they_are(act: str, dtype: torch.dtype) -> None:
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0, 3, -3, 6, 20, 20.5])
    z = torch.cat([4 * torch.randn(100), special]).to(dtype)
    assert_close(ACTIVATIONS[act](z), IN_TORCH[act](z.clone()).double(), scale=1.0)


def test_hardsigmoid_s_derivative_has_all_digits() -> None:
    z = torch.tensor([-3.0, -2.999999999, 0.0, 2.999999999, 3.0], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(ACTIVATIONS["hardsigmoid"](z).sum(), z)
    assert slope.tolist() == [0, 1 / 6, 1 / 6, 1 / 6, 0]


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_derivatives_through_a_norm(act: str, family: str) -> None:
    config = NormConfig("layer_norm", family, 1e-3, act, groups=1)  # type: ignore[arg-type]
    x, r = (2 * torch.randn(3, 4, dtype=torch.float64).requires_grad_() for _ in range(2))
    w, b = (torch.randn(4, dtype=torch.float64).requires_grad_() for _ in range(2))

    def f(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return FAMILIES[family].forward(config, x, r, w, b, None, None, None, None, True).y

    assert torch.autograd.gradcheck(f, (x, r, w, b))
    assert torch.autograd.gradgradcheck(f, (x, r, w, b))
