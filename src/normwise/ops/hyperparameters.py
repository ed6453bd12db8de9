"""What the norms accept as eps, momentum, sizes and axes, and what they say otherwise."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import Any, TypeGuard

from normwise.backends import scalars
from normwise.ops.errors import ShapeError
from normwise.words import given


def whole_number(name: str, value: Any) -> int:
    """`value`, any integer (NumPy's, say), as Python's own. True and False are no numbers here."""
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise TypeError(f"{name} should be of type int, got: {given(value)}: give a whole number")


def size(name: str, value: Any) -> int:
    """A number of channels or features, as Python's own integer."""
    found = whole_number(name, value)
    if found < 0:
        raise ShapeError(
            f"Trying to create tensor with negative dimension {found}: {name} must be 0 or more, but got {found}"
        )
    return found


def sizes(name: str, value: Any) -> tuple[int, ...]:
    """Several sizes, or one alone: of a row of numbers, or of a number."""
    return tuple(size(name, one) for one in (value if has_many(value) else (value,)))


def has_many(given: Any) -> TypeGuard[Iterable[Any]]:
    """Whether it is a row of numbers; an array or tensor without axes is one number."""
    return isinstance(given, Iterable) and getattr(given, "ndim", 1) > 0


def channel_dim(dim: Any) -> int:
    """The axis of the channels, any but that of the samples."""
    axis = whole_number("dim", dim)
    if axis == 0:
        raise ValueError("dim=0 holds the samples: name the axis of the channels, 1 or e.g. -1 for (N, L, C)")
    return axis


def correction(value: Any) -> int:
    """What is taken from the count of a running variance."""
    taken = whole_number("correction", value)
    if taken not in (0, 1):
        raise ValueError(f"correction must be 1 (unbiased, torch's) or 0 (biased, Keras' and Flax'), but got {taken}")
    return taken


def positive_eps(eps: Any) -> None:
    """eps keeps the division finite."""
    scalars.number("eps", eps, "a small positive number such as 1e-5")
    if not 0 < eps < math.inf:
        raise ValueError(f"eps must be positive, but got {eps}: use a small number such as 1e-5")


def momentum_range(momentum: Any, *, may_be_none: bool = True) -> None:
    """Running averages move by a share of the way, or, where there are none by step, by a cumulative average (None)."""
    if momentum is None and may_be_none:
        return
    scalars.number("momentum", momentum, f"a number in [0, 1]{' or None' * may_be_none}, such as 0.1")
    if not 0 <= momentum <= 1:
        raise ValueError(
            f"momentum must lie in [0, 1]{' or be None' * may_be_none}, but got {momentum}: it is the weight of the "
            "NEW batch in the running averages (Keras and Flax state the weight of the old value: use 1 minus theirs)"
        )


def dropout_range(dropout: Any) -> None:
    """A share of what leaves each layer but the last. In torch's words and by torch's error, whatever is wrong."""
    if not scalars.is_number(dropout) or not 0 <= dropout <= 1:
        raise ValueError(
            "dropout should be a number in range [0, 1] representing the probability of an element being zeroed, but "
            f"got {given(dropout)}"
        )
