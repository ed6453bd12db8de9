"""Layers without features, or whose input has none: empty results and gradients of zeros, as torch.nn's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import normwise
from support.backends import using

EMPTY = [
    ("BatchNorm1d", (0,), {}, (3, 0)),
    ("BatchNorm1d", (0,), {}, (0, 0)),
    ("BatchNorm1d", (0,), {"affine": False}, (3, 0, 4)),
    ("BatchNorm1d", (0,), {"momentum": None}, (3, 0, 4)),
    ("BatchNorm1d", (0,), {"track_running_stats": False}, (3, 0)),
    ("BatchNorm1d", (3,), {}, (2, 3, 0)),
    ("BatchNorm2d", (0,), {}, (2, 0, 3, 3)),
    ("BatchNorm2d", (3,), {}, (2, 3, 0, 3)),
    ("BatchNorm3d", (0,), {}, (2, 0, 3, 3, 1)),
    ("LayerNorm", (0,), {}, (3, 0)),
    ("LayerNorm", (0,), {"bias": False}, (2, 3, 0)),
    ("LayerNorm", (0,), {"elementwise_affine": False}, (3, 0)),
    ("LayerNorm", ((2, 0),), {}, (3, 2, 0)),
    ("LayerNorm", ((0, 2),), {}, (0, 0, 2)),
    ("RMSNorm", (0,), {}, (3, 0)),
    ("RMSNorm", ((2, 0),), {"eps": 1e-3}, (3, 2, 0)),
    ("RMSNorm", (0,), {"elementwise_affine": False}, (3, 0)),
    ("GroupNorm", (1, 0), {}, (3, 0)),
    ("GroupNorm", (2, 0), {}, (3, 0, 4)),
    ("GroupNorm", (2, 0), {"affine": False}, (0, 0, 2, 2)),
    ("GroupNorm", (2, 4), {}, (3, 4, 0)),
    ("InstanceNorm1d", (0,), {}, (3, 0, 4)),
    ("InstanceNorm1d", (0,), {"affine": True, "track_running_stats": True}, (0, 4)),
    ("InstanceNorm2d", (0,), {"affine": True}, (3, 0, 4, 4)),
    ("LSTMCell", (0, 4), {}, (2, 0)),
    ("GRUCell", (0, 4), {}, (2, 0)),
    ("RNNCell", (0, 4), {}, (2, 0)),
    ("LSTMCell", (3, 0), {}, (2, 3)),
    ("GRUCell", (3, 0), {}, (2, 3)),
    ("RNNCell", (3, 0), {}, (2, 3)),
]


def step(layer: nn.Module, shape: tuple[int, ...]) -> tuple[torch.Size, list[torch.Tensor], list[torch.Tensor]]:
    x = torch.ones(shape, requires_grad=True)
    y = layer(x)
    y = y[0] if isinstance(y, tuple) else y
    grads = torch.autograd.grad(
        y, [x, *layer.parameters()], torch.ones_like(y), allow_unused=True, materialize_grads=True
    )
    return y.shape, list(grads), [b.clone() for b in layer.buffers()]


@pytest.mark.parametrize(("name", "args", "kwargs", "shape"), EMPTY)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("backend", ["chosen", "no kernels", "reference"])
def test_no_features(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any], shape: tuple[int, ...], training: bool, backend: str
) -> None:
    ours = getattr(normwise, name)(*args, **kwargs).train(training)
    theirs = getattr(nn, name)(*args, **kwargs).train(training)
    with using(backend):
        size, grads, buffers = step(ours, shape)
    x = torch.ones(shape)
    assert size == (x if "Cell" not in name else theirs(x)[0] if name == "LSTMCell" else theirs(x)).shape
    assert grads[0].shape == x.shape
    if "Cell" not in name:
        assert all(not g.any() for g in grads)
    try:
        theirs(x)
    except IndexError:  # of ATen's kernel, which cannot do without a channel
        return
    torch.testing.assert_close(buffers, list(theirs.buffers()))


@pytest.mark.parametrize("layer", [normwise.SyncBatchNorm(0), normwise.BatchRenorm1d(0), normwise.FrozenBatchNorm1d(0)])
def test_no_features_beyond_torch(layer: nn.Module) -> None:
    for options in ({}, {"lengths": [4, 2, 0]}, {"residual": torch.ones(3, 0, 4)}):
        assert layer(torch.ones(3, 0, 4), **options).shape == (3, 0, 4)


@pytest.mark.parametrize("layer", [normwise.LayerNorm(0, dim=1), normwise.RMSNorm(0, dim=1), normwise.GroupNorm(1, 0)])
def test_no_features_with_lengths(layer: nn.Module) -> None:
    assert layer(torch.ones(3, 0, 4), lengths=[4, 2, 0]).shape == (3, 0, 4)
