"""Gains and biases of some rows of an input: of a sample or position."""

from __future__ import annotations

from torch import Tensor

from normwise.backends.protocol import NormConfig


def gain_obstacle(
    kernels: str, config: NormConfig, x: Tensor, weight: Tensor | None, bias: Tensor | None
) -> str | None:
    """What keeps `kernels` from a gain and bias that are not those of all rows: they may be those of neighbouring rows
    of equal number."""
    given = weight if weight is not None else bias
    assert given is not None
    if weight is not None and bias is not None and weight.shape != bias.shape:
        return f"{kernels} take gain and bias of one shape"
    rows = x.dim() - config.axes
    same = 0
    while same < rows and given.shape[same] == x.shape[same]:
        same += 1
    if not x.numel() or given.shape[rows:] != x.shape[rows:] or any(size != 1 for size in given.shape[same:rows]):
        return f"{kernels} take a gain and bias of neighbouring rows, by the first axes of the input"
    return None
