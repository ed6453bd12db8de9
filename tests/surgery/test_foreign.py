"""Weights from Keras and Flax, against numbers worked out by hand.

Keras' BatchNormalization gives gamma * (x - moving_mean) / sqrt(moving_variance + 1e-3) + beta; with a moving variance
of 3.999 the root is 2, with 0.249 it is 0.5.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import normwise
from tolerances import assert_close

KERAS = [np.array(values, dtype=np.float32) for values in ([2.0, -1.0], [1.0, 0.5], [3.0, -1.0], [3.999, 0.249])]
X = torch.tensor([[5.0, -1.0], [3.0, 0.0]])
# (5 - 3) / 2 * 2 + 1 = 3;  (-1 + 1) / 0.5 * -1 + 0.5 = 0.5;  0 * 2 + 1 = 1;  1 / 0.5 * -1 + 0.5 = -1.5
Y = torch.tensor([[3.0, 0.5], [1.0, -1.5]])


@pytest.mark.parametrize("layer", [normwise.BatchNorm1d, nn.BatchNorm1d, normwise.FrozenBatchNorm1d])
def test_keras_batch_normalization(layer):
    new = normwise.from_keras(layer, KERAS).eval()
    assert isinstance(new, layer)
    assert_close(new(X), Y, count=4)
    assert new.eps == 1e-3


def test_momentum_means_the_same():
    """After a batch of mean 4: 0.9 * 3 + 0.1 * 4 = 3.1 in Keras with momentum=0.9, as here with 0.1."""
    new = normwise.from_keras(normwise.BatchNorm1d, KERAS, momentum=0.9)
    assert new.momentum == pytest.approx(0.1)
    new(X)
    assert_close(new.running_mean[0], torch.tensor(3.1))
    assert normwise.from_keras_momentum(0.99) == pytest.approx(0.01)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        normwise.from_keras_momentum(1.5)


@pytest.mark.parametrize(
    ("scale", "center", "expected"),
    [
        (False, True, [[2.0, 0.5], [1.0, 2.5]]),
        (True, False, [[2.0, 0.0], [0.0, -2.0]]),
        (False, False, [[1.0, 0.0], [0.0, 2.0]]),
    ],
)
def test_without_gamma_or_beta(scale, center, expected):
    weights = [*KERAS[:1] * scale, *KERAS[1:2] * center, *KERAS[2:]]
    new = normwise.from_keras(normwise.BatchNorm1d, weights, scale=scale, center=center).eval()
    assert_close(new(X), torch.tensor(expected), count=4)


def test_images_and_dtype():
    new = normwise.from_keras(normwise.BatchNorm2d, [w.astype(np.float64) for w in KERAS], act="relu").eval()
    assert new.weight.dtype == torch.float64
    assert_close(new(X.double().view(2, 2, 1, 1)).view(2, 2), Y.clamp(min=0).double(), dtype=torch.float32)


def test_keras_layer_and_group_normalization():
    """Rows (1, -1) and (3, -3): variance 1 and 9, so x / sqrt(1.001) and x / sqrt(9.001), times gamma, plus beta."""
    x = torch.tensor([[1.0, -1.0], [3.0, -3.0]])
    expected = x / torch.tensor([[1.001], [9.001]]).sqrt() * torch.tensor([2.0, -1.0]) + torch.tensor([1.0, 0.5])
    assert_close(normwise.from_keras(normwise.LayerNorm, KERAS[:2])(x), expected, count=2)
    group = normwise.from_keras(normwise.GroupNorm, KERAS[:2], num_groups=1)
    assert_close(group(x), expected, count=2)


def test_flax():
    """Flax' BatchNorm has eps 1e-5: a variance of 3.99999 gives the root 2."""
    params = {"scale": [2.0, -1.0], "bias": [1.0, 0.5]}
    stats = {"mean": [3.0, -1.0], "var": [3.99999, 0.24999]}
    new = normwise.from_flax(normwise.BatchNorm1d, params, stats, momentum=0.9).eval()
    assert_close(new(X), Y, count=4)
    assert new.momentum == pytest.approx(0.1)
    rms = normwise.from_flax(normwise.RMSNorm, {"scale": torch.tensor([2.0, 1.0])})
    assert rms.eps == 1e-6
    assert_close(rms(torch.tensor([[3.0, 3.0]])), torch.tensor([[2.0, 1.0]]))
    assert_close(normwise.from_flax(normwise.LayerNorm, {"scale": [2.0, 2.0]})(X[:1]), torch.tensor([[2.0, -2.0]]))


def test_what_does_not_fit():
    with pytest.raises(ValueError, match="gamma, beta, moving_mean, moving_variance in this order, but got 3"):
        normwise.from_keras(normwise.BatchNorm1d, KERAS[1:])
    with pytest.raises(ValueError, match="one shape"):
        normwise.from_keras(normwise.BatchNorm1d, [*KERAS[:3], np.ones(3)])
    with pytest.raises(ValueError, match=r"'mean', 'var'\] for BatchNorm1d, but got \[\]"):
        normwise.from_flax(normwise.BatchNorm1d, {"scale": [1.0]})
    with pytest.raises(ValueError, match="of the one layer"):
        normwise.from_flax(normwise.LayerNorm, {"LayerNorm_0": {"scale": [1.0]}})
