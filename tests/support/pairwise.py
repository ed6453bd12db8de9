"""Parameters of a test by pairs: each two values of two parameters occur together, but not each combination of all."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, product
from typing import Any


def pairwise(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Few combinations of one value of each axis in which every two values of two axes meet; the same each time.

    Most slips of a kernel take two parameters to show, so that these find what all combinations find. Greedy: of all
    combinations, next comes the first of those that bring most pairs which have not been together. For two axes that is
    all of them, for three and more about as many as the product of the two longest.
    """
    every = list(product(*(range(len(axis)) for axis in axes)))
    left = {pair for combination in every for pair in _pairs(combination)}
    chosen: list[tuple[int, ...]] = []
    while left:
        best = max(every, key=lambda combination: len(left.intersection(_pairs(combination))))
        chosen.append(best)
        left.difference_update(_pairs(best))
    return [tuple(axis[n] for axis, n in zip(axes, combination, strict=True)) for combination in sorted(chosen)]


def _pairs(combination: tuple[int, ...]) -> list[tuple[tuple[int, int], ...]]:
    return list(combinations(enumerate(combination), 2))
