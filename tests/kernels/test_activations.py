"""The fused activations at each of their arguments, special ones too, against torch's in float64.

BatchNorm in evaluation with a mean of 0 and a variance of 1 hands its input to the activation as it is.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from support import kernel_truth as truth
from support.kernel_calls import channels_backward, channels_forward
from support.tolerances import assert_close

INF, NAN = float("inf"), float("nan")
# These keep their relative digits in the tails; of the others a difference of numbers as large as 1 is left.
BY_THE_RESULT = {"relu", "leaky_relu", "relu6", "hardswish", "hardsigmoid", "elu", "softplus", "mish"}
SLOPE_BY_THE_RESULT = {"relu", "leaky_relu", "relu6", "hardsigmoid", "elu", "softplus"}

each_act = pytest.mark.parametrize("act", truth.ACTIVATIONS)
each_dtype = pytest.mark.parametrize("dtype", truth.DTYPES)


def activated(act: str, z: Tensor) -> tuple[Tensor, Tensor]:
    """act(z) and its derivative by the kernels."""
    wide = torch.float64 if z.dtype is torch.float64 else torch.float32
    mean, var = torch.zeros(1, dtype=wide), torch.ones(1, dtype=wide)
    x, zero = z.view(1, 1, -1), torch.zeros(1, 1, len(z), dtype=z.dtype)
    y, stats, _ = channels_forward(x, mean, var, None, None, False, 0.1, 0.0, act=act, residual=zero)
    # The residual's gradient is the derivative itself; in the input's, infinities meet the statistics.
    *_, slope = channels_backward(torch.ones_like(x), x, stats, None, None, False, act=act, residual=zero)
    assert slope is not None
    return y.view(-1), slope.view(-1)


def by_torch(act: str, z: Tensor) -> tuple[Tensor, Tensor]:
    s = truth.leaf(z)
    assert s is not None
    y = truth.ACTIVATIONS[act](s)
    return y.detach(), torch.autograd.grad(y.sum(), s)[0]


@each_act
@each_dtype
def test_values_and_derivatives(isa: str, dtype: torch.dtype, act: str) -> None:
    tails = torch.logspace(-37, 1.9, 500, dtype=torch.float64)
    z = torch.cat([torch.linspace(-30, 30, 4001, dtype=torch.float64), tails, -tails]).to(dtype)
    y, slope = activated(act, z)
    expected, derivative = by_torch(act, z)
    assert_close(y, expected, scale=0.0 if act in BY_THE_RESULT else 1.0, name="y")
    assert_close(slope, derivative, kind="grad", scale=0.0 if act in SLOPE_BY_THE_RESULT else 1.0, name="slope")


@pytest.mark.parametrize(
    ("act", "slopes"),
    [
        ("relu6", {0.0: 0.0, 6.0: 0.0, 3.0: 1.0}),
        ("hardswish", {-3.0: 0.0, 3.0: 1.0, 0.0: 0.5}),
        ("hardsigmoid", {-3.0: 0.0, 3.0: 0.0}),
        ("elu", {0.0: 1.0}),
        ("softplus", {20.5: 1.0, 1000.0: 1.0}),
    ],
)
@each_dtype
def test_derivatives_at_the_joints(isa: str, dtype: torch.dtype, act: str, slopes: dict[float, float]) -> None:
    z = torch.tensor([*slopes] * 17, dtype=dtype)
    _, slope = activated(act, z)
    assert slope.tolist() == [*slopes.values()] * 17
    assert_close(slope, by_torch(act, z)[1], kind="grad")


@each_dtype
def test_softplus_is_the_identity_above_20(isa: str, dtype: torch.dtype) -> None:
    above = torch.tensor([20.125, 20.5, 21.0, 3e38], dtype=dtype)
    assert torch.equal(activated("softplus", above)[0], above)
    if dtype is torch.float64:
        assert activated("softplus", torch.tensor([20.0], dtype=dtype))[0].item() > 20


@pytest.mark.parametrize("act", truth.FURTHER_ACTS)
@each_dtype
def test_special_values(isa: str, dtype: torch.dtype, act: str) -> None:
    """NaN stays NaN, and infinities give what torch gives them: NaN where it is 0 times infinity."""
    special = [NAN, INF, -INF, 1e30, -1e30, 3e38, -3e38, 1e-40, -1e-40, 0.0]
    z = torch.tensor(special * 7, dtype=dtype)
    y, slope = activated(act, z)
    expected, derivative = by_torch(act, z)
    assert_close(y, expected, scale=0.0, name="y")
    # torch's derivatives of gelu_tanh and mish at infinities are NaN, ours are the limits. At NaN those of relu6 and
    # hardsigmoid are 0, and those of hardswish and elu NaN or 1 in torch, as the size of the tensor has it.
    limits = {INF: 1.0, -INF: 0.0, NAN: NAN}
    if act in ("gelu_tanh", "mish"):
        changed = [limits.get(v, d) for v, d in zip(special * 7, derivative.tolist(), strict=True)]
        derivative = torch.tensor(changed, dtype=torch.float64)
    nan = z.isnan()
    assert slope[nan].eq(0).all() if act in ("relu6", "hardsigmoid") else slope[nan].isnan().all()
    assert_close(slope[~nan], derivative[~nan], kind="grad", name="slope")
