"""What models ask of a LayerNorm's or RMSNorm's gain beyond torch: that it be stored around a number other than 0, and
that it be applied to what was rounded already."""

from __future__ import annotations

import math
from typing import Any, Literal, TypeAlias

from torch import Tensor

from normwise.backends.activations import add_residual_and_activate
from normwise.backends.protocol import accumulation_dtype
from normwise.backends.scalars import number

Cast: TypeAlias = Literal["output", "input"]


def check(offset: Any, cast: Any) -> None:
    """
    Raises:
        TypeError: an offset that is not a number. ValueError: one that is not finite; an unknown cast.
    """
    number(
        "offset",
        offset,
        "a number",
        "it is what the weight is stored around, 1.0 in Gemma; what differs from feature to feature belongs into the "
        "weight",
        tensors=False,
    )
    if not -math.inf < offset < math.inf:
        raise ValueError(f"offset must be finite, but got {offset}: the gain is offset + weight")
    if cast not in ("output", "input", None):
        raise ValueError(
            f"unknown cast {cast!r}: expected 'output' (round once, behind gain and bias, as Olmo 2 does), 'input' "
            "(round to the input's dtype before gain and bias, as Llama does) or None (round once, by the quickest "
            "backend)"
        )


def stored_around(weight: Tensor | None, offset: float, cast: Cast | None) -> Tensor | None:
    """The gain offset + weight; None without a weight.

    Where all is rounded at the end, in float32 at least: in bfloat16 1 + weight has 8 bits, of which a small weight
    would fill the last ones at most.
    """
    if weight is None or not offset or not weight.is_floating_point():
        return weight
    if cast != "input":
        weight = weight.to(accumulation_dtype(weight.dtype))
    return weight + offset


def follows_rounding(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether gain and bias applied to normalized values of the dtype of `x` make a difference: not where all is of one
    dtype, in which the norm computes anyway."""
    given = [t for t in (weight, bias) if t is not None]
    return bool(given) and (accumulation_dtype(x.dtype) != x.dtype or any(t.dtype != x.dtype for t in given))


def apply(z: Tensor, weight: Tensor | None, bias: Tensor | None, mask: Tensor | None, act: str | None) -> Tensor:
    """act(weight * z + bias) by torch's own rules for dtypes, 0 where `mask` is False."""
    y = z if weight is None else weight * z
    y = y if bias is None else y + bias
    y = y if mask is None else y.masked_fill(~mask, 0)
    return add_residual_and_activate(y, None, act, mask)
