"""Features that are far larger than the others, and the size of what flows from block to block."""

from __future__ import annotations

import torch
from torch import Tensor


def kurtosis(squares: Tensor) -> float:
    """mean(s^4) / mean(s^2)^2 over features whose mean squares s^2 are `squares` (features,).

    1 where all are of one size, `len(squares)` where one has everything (He et al. 2024, Understanding and Minimising
    Outlier Features in Transformer Training: the kurtosis of neuron activation norms). 0 where all are 0.
    """
    mean = squares.double().mean()
    return float(squares.double().square().mean() / mean.square()) if mean > 0 else 0.0


class FeatureSizes:
    """The sizes of the features of a tensor (..., features) over calls. What is not finite is left out.

    Attributes:
        peak: the largest |x|.
        positions: how many there were.
    """

    def __init__(self) -> None:
        self.sums = torch.zeros(0, dtype=torch.float64)
        self.positions = 0
        self.peak = 0.0
        self.typical_sizes: list[float] = []

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        x = x.detach().flatten(0, -2)
        x = x if x.dtype == torch.float64 else x.float()
        finite = torch.isfinite(x).all(1)
        x = x if bool(finite.all()) else x[finite]
        if not x.numel():
            return
        squares = x.square()
        sums = squares.sum(0).double().cpu()
        self.sums = sums if len(self.sums) != len(sums) else self.sums + sums
        self.positions += len(x)
        self.peak = max(self.peak, float(x.abs().max()))
        sizes = squares.mean(1).sqrt()
        if bool((sizes > 0).any()):
            self.typical_sizes.append(float(sizes[sizes > 0].median()))

    @property
    def squares(self) -> Tensor:
        """(features,) mean squares over all positions."""
        return self.sums / max(1, self.positions)

    @property
    def kurtosis(self) -> float:
        return kurtosis(self.squares) if len(self.sums) else 0.0

    @property
    def median(self) -> float:
        """The root mean square of the median feature."""
        return float(self.squares.sqrt().median()) if len(self.sums) else 0.0

    @property
    def typical(self) -> float:
        """The root mean square of the median position, the mean over the calls: a few positions that tower above the
        others (Sun et al. 2024, Massive Activations in Large Language Models), and padding that is 0, do not move it.
        """
        return sum(self.typical_sizes) / max(1, len(self.typical_sizes))
