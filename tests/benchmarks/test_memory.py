"""What layers keep for their backward, in tensors of the input's size, by the same count that the suite prints."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normwise
from benchmarks.held import kept, peak
from normwise.backends.cpu import library

SHAPE = (16, 64, 32, 32)
ROWS = (1024, 1024)
NEEDS_KERNELS = pytest.mark.skipif(library.missing() is not None, reason=str(library.missing()))


def tensors_kept(layer: nn.Module, forward: Callable[[Tensor], object], x: Tensor) -> float:
    def outputs() -> list[Tensor]:
        y = forward(x)
        return list(y) if isinstance(y, tuple) else [y]

    return sum(kept(outputs, layer.parameters()).values()) / x.nbytes


@NEEDS_KERNELS
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: normwise.BatchNorm2d(64), 1),
        (lambda: normwise.BatchNorm2d(64, act="relu"), 1),
        (lambda: normwise.BatchNorm2d(64, act="gelu").eval(), 1),
        (lambda: normwise.GroupNorm(8, 64), 1),
        (lambda: normwise.GroupNorm(8, 64, act="silu"), 1),
        (lambda: normwise.InstanceNorm2d(64, affine=True), 1),
    ],
    ids=["batch", "batch relu", "batch gelu eval", "group", "group silu", "instance"],
)
def test_norms_over_positions_keep_their_input(
    make: Callable[[], nn.Module], expected: int, channels_last: bool
) -> None:
    layer, x = make(), torch.randn(SHAPE)
    x = x.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format).requires_grad_()
    assert tensors_kept(layer, layer, x) == pytest.approx(expected, rel=0.02)


@NEEDS_KERNELS
@pytest.mark.parametrize(
    "kind",
    [normwise.BatchNorm2d, lambda channels, **more: normwise.GroupNorm(8, channels, **more), normwise.InstanceNorm2d],
    ids=["batch", "group", "instance"],
)
def test_a_residual_before_an_activation_is_kept_and_one_without_is_not(kind: Callable[..., nn.Module]) -> None:
    x, residual = torch.randn(SHAPE, requires_grad=True), torch.randn(SHAPE, requires_grad=True)
    plain, relu = kind(64), kind(64, act="relu")
    assert tensors_kept(plain, lambda x: plain(x, residual=residual), x) == pytest.approx(1, rel=0.02)
    assert tensors_kept(relu, lambda x: relu(x, residual=residual), x) == pytest.approx(2, rel=0.02)


@NEEDS_KERNELS
@pytest.mark.parametrize("act", [None, "gelu"])
@pytest.mark.parametrize("kind", [normwise.LayerNorm, normwise.RMSNorm])
def test_norms_of_features_keep_one_tensor_with_residual_or_without(kind: type[nn.Module], act: str | None) -> None:
    layer = kind(ROWS[1], act=act)
    x, residual = torch.randn(ROWS, requires_grad=True), torch.randn(ROWS, requires_grad=True)
    assert tensors_kept(layer, layer, x) == pytest.approx(1, rel=0.02)
    assert tensors_kept(layer, lambda x: layer(x, add=residual), x) == pytest.approx(1, rel=0.02)


@NEEDS_KERNELS
@pytest.mark.parametrize(
    ("kind", "norm", "expected"),
    [
        # Input and output, and: products of both terms and c; activated gates and c; products of both terms, with a
        # norm or without; the products' sum; nothing.
        (normwise.LSTM, "layer", 2 + 4 + 4 + 1),
        (normwise.LSTM, None, 2 + 4 + 1),
        (normwise.GRU, "layer", 2 + 3 + 3),
        (normwise.GRU, None, 2 + 3 + 3),
        (normwise.RNN, "layer", 2 + 1),
        (normwise.RNN, None, 2),
    ],
)
def test_recurrent_layers_keep_each_product_once(kind: type[nn.Module], norm: str | None, expected: int) -> None:
    layer, x = kind(64, 64, norm=norm), torch.randn(50, 16, 64, requires_grad=True)
    assert tensors_kept(layer, lambda x: layer(x)[0], x) == pytest.approx(expected, rel=0.02)


@NEEDS_KERNELS
@pytest.mark.parametrize(("kind", "output"), [(normwise.LSTM, 1), (normwise.GRU, 2)])
def test_in_bfloat16_the_rest_is_float32_and_the_output_what_the_backward_needs(
    kind: type[nn.Module], output: int
) -> None:
    layer, x = kind(64, 64, dtype=torch.bfloat16), torch.randn(50, 16, 64).bfloat16().requires_grad_()
    inside = {normwise.LSTM: 4 + 4 + 1, normwise.GRU: 3 + 3}[kind]
    assert tensors_kept(layer, lambda x: layer(x)[0], x) == pytest.approx(1 + output + 2 * inside, rel=0.02)


def test_the_count_is_that_of_blocks() -> None:
    """Known cases: torch keeps the input and the output of a ReLU; a view or a second use of a block adds nothing."""
    x = torch.randn(1000, requires_grad=True)
    y, weight = x * 1, nn.Parameter(torch.randn(1000))
    assert sum(kept(lambda: [F.relu(y)]).values()) == x.nbytes
    assert sum(kept(lambda: [y * y.view(10, 100).flatten()]).values()) == x.nbytes
    assert sum(kept(lambda: [y * weight], [weight]).values()) == x.nbytes


class Holder(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.held = {"a": (x.clone(), [x.clone()]), "b": array("d", [1.0] * 10)}
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return dy


def test_what_a_function_holds_beside_saved_tensors_counts() -> None:
    x = torch.randn(1000, requires_grad=True)
    assert sum(kept(lambda: [Holder.apply(x)]).values()) == 2 * x.nbytes + 80


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads /proc")
def test_peak_sees_what_lives_at_once() -> None:
    assert peak(lambda: torch.ones(16 << 20).amax()) == pytest.approx(64 << 20, rel=0.1)
