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
from support.tolerances import assert_close

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


@pytest.mark.parametrize("layer", [normwise.LSTM, nn.GRU, normwise.RNNCell])
def test_recurrent_weights_are_called_what_they_are(layer):
    """A Keras LSTM has no gamma."""
    weights = [np.zeros((3, 16)), np.zeros((4, 16)), np.zeros(16)]
    with pytest.raises(TypeError, match=r"but got \w+: copy recurrent weights .*recurrent_kernel") as raised:
        normwise.from_keras(layer, weights)
    assert "gamma" not in str(raised.value)
    with pytest.raises(TypeError, match=r"copy recurrent weights .*transposed kernels of ii"):
        normwise.from_flax(layer, {"ii": {"kernel": weights[0]}})


@pytest.mark.parametrize(
    ("layer", "words"),
    [(nn.Linear, "but got Linear"), (normwise.BatchNorm2d(2), "give the class itself, e.g. normwise.BatchNorm2d")],
)
def test_other_layers_are_refused(layer, words):
    for call in (lambda: normwise.from_keras(layer, KERAS), lambda: normwise.from_flax(layer, {"scale": [1.0]})):
        with pytest.raises(TypeError, match=words):
            call()


def test_the_recipe_for_a_keras_lstm_computes_what_keras_does():
    """One step of Keras' LSTMCell, written out: z = x kernel + h recurrent_kernel + bias, in the blocks i, f, c, o."""
    kernel, recurrent, bias = torch.randn(3, 16), torch.randn(4, 16), torch.randn(16)
    x, h, c = torch.randn(2, 3), torch.randn(2, 4), torch.randn(2, 4)
    i, f, g, o = (x @ kernel + h @ recurrent + bias).chunk(4, -1)
    c_next = f.sigmoid() * c + i.sigmoid() * g.tanh()
    expected = o.sigmoid() * c_next.tanh()
    layer = nn.LSTM(3, 4)
    with torch.no_grad():
        layer.weight_ih_l0.copy_(kernel.T)
        layer.weight_hh_l0.copy_(recurrent.T)
        layer.bias_ih_l0.copy_(bias)
        layer.bias_hh_l0.zero_()
    _, (h_next, _) = layer(x[None], (h[None], c[None]))
    assert_close(h_next[0], expected, kind="composed", count=8)


def test_the_recipe_for_a_keras_gru_computes_what_keras_does():
    """Keras' GRUCell with reset_after=True, in the blocks z, r, h: h_t = z h + (1 - z) hh."""
    kernel, recurrent, bias = torch.randn(3, 12), torch.randn(4, 12), torch.randn(2, 12)
    x, h = torch.randn(2, 3), torch.randn(2, 4)
    xz, xr, xh = (x @ kernel + bias[0]).chunk(3, -1)
    hz, hr, hh = (h @ recurrent + bias[1]).chunk(3, -1)
    z, r = (xz + hz).sigmoid(), (xr + hr).sigmoid()
    expected = z * h + (1 - z) * (xh + r * hh).tanh()
    layer = nn.GRU(3, 4)

    def ordered(weight: torch.Tensor) -> torch.Tensor:
        z, r, n = weight.chunk(3, -1)
        return torch.cat([r, z, n], -1)

    with torch.no_grad():
        layer.weight_ih_l0.copy_(ordered(kernel).T)
        layer.weight_hh_l0.copy_(ordered(recurrent).T)
        layer.bias_ih_l0.copy_(ordered(bias[0]))
        layer.bias_hh_l0.copy_(ordered(bias[1]))
    assert_close(layer(x[None], h[None])[1][0], expected, kind="composed", count=8)
