"""What a benchmark compares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """One thing done in two ways.

    Attributes:
        name: what is done, with the shape.
        ours, theirs: the two ways, each a call that does all of it.
        against: whose way `theirs` is.
        error: how far ours is from the truth, as a share of what its dtype allows: above 1 is wrong.
        limit: a call that does nothing but what cannot be avoided, such as moving the bytes, and what it is called.
        limit_scale: how many such calls the case amounts to.
        must, aim: the ratio ours/theirs that is demanded and the one that is hoped for.
    """

    name: str
    ours: Callable[[], object]
    theirs: Callable[[], object]
    against: str
    error: Callable[[], float]
    limit: Callable[[], object] | None = None
    limit_name: str = ""
    limit_scale: float = 1.0
    must: float | None = None
    aim: float | None = None
