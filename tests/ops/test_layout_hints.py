"""An input whose axes are in another order than the layer reads is told which, and what to write."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import normwise

X = torch.zeros(4, 29, 12)  # (N, L, C), or (B, T, C)
IMAGES = torch.zeros(4, 5, 6, 12)
LENGTHS = [7, 29, 18, 12]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: normwise.BatchNorm1d(12)(X), "x.transpose(1, 2)"),
        (lambda: normwise.BatchNorm1d(12, track_running_stats=False)(X), "x.transpose(1, 2)"),
        (lambda: normwise.BatchNorm1d(12, dim=-1)(X.mT), "x.transpose(1, 2)"),
        (lambda: normwise.BatchRenorm1d(12)(X), "x.transpose(1, 2)"),
        (lambda: normwise.InstanceNorm1d(12, affine=True)(X), "x.transpose(1, 2)"),
        (lambda: normwise.BatchNorm2d(12)(IMAGES), "x.movedim(-1, 1)"),
        (lambda: normwise.GroupNorm(3, 12)(IMAGES), "x.movedim(-1, 1)"),
        (lambda: normwise.LayerNorm(12)(X.mT), "dim=1, if axis 1 holds the features"),
        (lambda: normwise.RMSNorm(12)(IMAGES.movedim(-1, 1)), "dim=1, if axis 1 holds the features"),
    ],
)
def test_channels_on_another_axis(call: Callable[[], Any], says: str) -> None:
    with pytest.raises((ValueError, RuntimeError)) as caught:
        call()
    assert says in str(caught.value)


@pytest.mark.parametrize(
    "call",
    [
        lambda: normwise.BatchNorm1d(12)(torch.zeros(4, 11, 13)),
        lambda: normwise.BatchNorm1d(12)(torch.zeros(4, 11)),
        lambda: normwise.GroupNorm(3, 12)(torch.zeros(4, 11, 12, 2)),
    ],
)
def test_there_is_no_hint_where_no_axis_fits(call: Callable[[], Any]) -> None:
    with pytest.raises((ValueError, RuntimeError)) as caught:
        call()
    assert "movedim" not in str(caught.value)
    assert "transpose" not in str(caught.value)


@pytest.mark.parametrize(
    ("batch_first", "x", "arguments", "says"),
    [
        (False, X, {"lengths": LENGTHS}, "batch_first=True"),
        (True, X.transpose(0, 1), {"lengths": LENGTHS}, "batch_first=False"),
        (False, X, {"hx": (torch.zeros(1, 4, 8), torch.zeros(1, 4, 8))}, "batch_first=True"),
        (True, X.mT, {}, "x.transpose(1, 2)"),
        (False, X.mT, {}, "x.permute(2, 0, 1)"),
        (False, X.transpose(0, 1), {"reset": torch.zeros(4, 29, dtype=torch.bool)}, "give reset.T"),
    ],
)
def test_sequences_in_another_order(batch_first: bool, x: Any, arguments: dict[str, Any], says: str) -> None:
    with pytest.raises((ValueError, RuntimeError)) as caught:
        normwise.LSTM(12, 8, batch_first=batch_first)(x, **arguments)
    assert says in str(caught.value)


def test_a_wrong_number_of_lengths_is_no_matter_of_order() -> None:
    with pytest.raises(ValueError, match=r"lengths must be of shape \(29,\)") as caught:
        normwise.LSTM(12, 8)(X, lengths=[1, 2, 3])
    assert "batch_first" not in str(caught.value)


@pytest.mark.parametrize(
    ("act", "says"),
    [
        (nn.ReLU(), "act='relu'"),
        (nn.SiLU, "act='silu'"),
        ("swish", "act='silu'"),
        ("ReLU", "act='relu'"),
        (nn.functional.gelu, "act='gelu'"),
        (nn.GELU(approximate="tanh"), "act='gelu_tanh'"),
        (nn.LeakyReLU(), "act='leaky_relu'"),
        (nn.LeakyReLU(0.2), "nn.Sequential(norm, "),
        ("tanh", "nn.Sequential(norm, "),
        (nn.Tanh(), "nn.Sequential(norm, "),
        (lambda x: x, "nn.Sequential(norm, "),
    ],
)
def test_an_activation_by_another_name(act: Any, says: str) -> None:
    with pytest.raises(ValueError, match="unknown act") as caught:
        normwise.BatchNorm1d(4, act=act)
    assert says in str(caught.value)
