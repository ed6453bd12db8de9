"""What a norm is told to leave out is left out of its distributions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import normwise
from normwise.diagnosis import diagnose

SAMPLES, STEPS, FEATURES = 12, 9, 5
LENGTHS = torch.tensor([8, 3, 5, 1] * 3)  # the last step is of nobody


class Padded(nn.Module):
    """A norm with features where it has them, by a mask or by lengths, and a linear layer on the mean over time."""

    def __init__(self, norm: nn.Module, features: int, by_lengths: bool) -> None:
        super().__init__()
        self.norm, self.linear = norm, nn.Linear(FEATURES, 3)
        self.features, self.by_lengths = features, by_lengths

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        told = {"lengths": lengths} if self.by_lengths else {"mask": torch.arange(STEPS) < lengths[:, None]}
        y = self.norm(x.movedim(2, self.features), **told)
        return self.linear(y.movedim(self.features, 2).sum(1) / lengths[:, None])


@pytest.mark.parametrize("padding", [torch.nan, 1e3])
@pytest.mark.parametrize(
    ("norm", "features", "by_lengths"),
    [
        (lambda: normwise.BatchNorm1d(FEATURES), 1, True),
        (lambda: normwise.BatchNorm1d(FEATURES), 1, False),
        (lambda: normwise.GroupNorm(1, FEATURES), 1, False),
        (lambda: normwise.LayerNorm(FEATURES), 2, False),
        (lambda: normwise.LayerNorm(FEATURES), 2, True),
        (lambda: normwise.LayerNorm(FEATURES, dim=1), 1, True),
    ],
    ids=["BatchNorm1d by lengths", "BatchNorm1d", "GroupNorm", "LayerNorm", "LayerNorm by lengths", "LayerNorm dim"],
)
def test_padding_that_a_norm_is_told_of_is_not_counted(norm, features, by_lengths, padding):
    model = Padded(norm(), features, by_lengths)
    valid = torch.arange(STEPS) < LENGTHS[:, None]
    x = torch.randn(SAMPLES, STEPS, FEATURES) * 2 + torch.arange(FEATURES)
    data = [({"x": x.masked_fill(~valid[..., None], padding), "lengths": LENGTHS}, torch.randint(3, (SAMPLES,)))]
    found = diagnose(model, data, loss=nn.functional.cross_entropy)
    seen, values = found.layer("norm").input, x[valid].double()

    assert (seen.all.count, seen.all.nonfinite) == (values.numel(), 0)
    assert seen.all.mean == pytest.approx(float(values.mean()), rel=1e-5)
    assert seen.all.std == pytest.approx(float(values.std(correction=0)), rel=1e-5)
    assert seen.all.maximum == pytest.approx(float(values.max()))
    assert seen.features.means.maximum == pytest.approx(float(values.mean(0).max()), rel=1e-5)
    assert seen.features.stds.minimum == pytest.approx(float(values.std(0, correction=0).min()), rel=1e-5)
    of_each = torch.stack([sample[:length].mean() for sample, length in zip(x, LENGTHS, strict=True)])
    assert seen.samples.means.maximum == pytest.approx(float(of_each.max()), rel=1e-5)
    assert len(seen.time.mean) == int(LENGTHS.max())
    for t, (mean, std) in enumerate(zip(seen.time.mean, seen.time.std, strict=True)):
        running = x[t < LENGTHS, t]
        assert mean == pytest.approx(float(running.mean()), rel=1e-4)
        assert std == pytest.approx(float(running.std(correction=0)), rel=1e-4)
    assert all(min(row) > -50 and max(row) < 50 for row in seen.time.percentiles)
    assert found.layer("norm").output.all.count == values.numel()
    assert "NW003" not in {finding.code for finding in found.findings}


def test_a_mask_that_differs_between_channels():
    mask = torch.rand(6, 3, 7) < 0.7
    mask[2] = False
    x = torch.randn(6, 3, 7) + 5

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = normwise.BatchNorm1d(3), nn.Linear(21, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.norm(x, mask=mask).flatten(1))

    found = diagnose(Net(), [(x, torch.randint(2, (6,)))], loss=nn.functional.cross_entropy).layer("norm")
    means = [float(x[:, c][mask[:, c]].mean()) for c in range(3)]
    assert found.input.all.count == int(mask.sum())
    assert found.input.features.means.minimum == pytest.approx(min(means), rel=1e-5)
    of_each = [float(sample[valid].mean()) for sample, valid in zip(x, mask, strict=True) if valid.any()]
    assert found.input.samples.means.minimum == pytest.approx(min(of_each), rel=1e-5)
    distance = found.norm.running.distance  # running mean 0
    stds = [float(x[:, c][mask[:, c]].std(correction=0)) for c in range(3)]
    assert distance.maximum == pytest.approx(max(abs(m) / s for m, s in zip(means, stds, strict=True)), rel=1e-4)
