"""FrozenBatchNorm: torch's BatchNorm in evaluation, in either mode and with nothing to learn."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import normwise
from normwise.nn.construct import eps_of
from support.norm_cases import randomize
from support.tolerances import assert_close


@pytest.mark.parametrize(("rank", "shape"), [(1, (4, 3)), (1, (4, 3, 5)), (2, (2, 3, 4, 5)), (3, (2, 3, 2, 4, 3))])
def test_equals_torch_in_evaluation_and_learns_nothing(rank, shape, device):
    theirs = randomize(getattr(nn, f"BatchNorm{rank}d")(3, eps=1e-3, device=device)).eval()
    ours = getattr(normwise, f"FrozenBatchNorm{rank}d")(3, eps=1e-3, device=device)
    ours.load_state_dict(theirs.state_dict())
    before = {name: value.clone() for name, value in ours.named_buffers()}
    x = torch.randn(shape, device=device, requires_grad=True)
    upstream = torch.randn(shape, device=device)
    y, expected = ours.train()(x), theirs(x)
    assert_close(y, expected)
    assert_close(torch.autograd.grad(y, x, upstream)[0], torch.autograd.grad(expected, x, upstream)[0], kind="grad")
    assert list(ours.parameters()) == []
    assert all(torch.equal(value, before[name]) for name, value in ours.named_buffers())


def test_mask_residual_and_act():
    layer = randomize(normwise.FrozenBatchNorm1d(3, act="relu", bias=False))
    x, residual, lengths = torch.randn(2, 3, 5), torch.randn(2, 3, 5), torch.tensor([2, 5])
    y = layer(x, lengths=lengths, residual=residual)
    assert (y[0, :, 2:] == 0).all()
    mean, var = layer.running_mean[:, None], layer.running_var[:, None]
    expected = torch.relu((x - mean) / (var + eps_of(layer)).sqrt() * layer.weight[:, None] + residual)
    assert_close(y[1], expected[1])


def test_what_does_not_fit():
    with pytest.raises(ValueError, match="eps"):
        normwise.FrozenBatchNorm1d(3, eps=0)
    with pytest.raises(ValueError, match="unknown act"):
        normwise.FrozenBatchNorm1d(3, act="rleu")
    with pytest.raises(ValueError, match="4D"):
        normwise.FrozenBatchNorm2d(3)(torch.randn(2, 3))
    assert "FrozenBatchNorm2d(3, eps=1e-05, affine=False)" in repr(normwise.FrozenBatchNorm2d(3, affine=False))
