"""What `support.pairwise` leaves of all combinations has every pair in it."""

from __future__ import annotations

from itertools import combinations, product

import pytest

from support.pairwise import pairwise


@pytest.mark.parametrize("sizes", [(5, 3, 2), (2, 2, 2), (4, 4, 3, 2, 2), (1, 5, 2), (3, 1, 1)], ids=str)
def test_every_two_values_of_two_axes_meet(sizes: tuple[int, ...]) -> None:
    axes = [[f"{axis} {n}" for n in range(size)] for axis, size in enumerate(sizes)]
    chosen = pairwise(*axes)
    wanted = {pair for one, other in combinations(axes, 2) for pair in product(one, other)}
    assert {pair for combination in chosen for pair in combinations(combination, 2)} == wanted
    assert len(set(chosen)) == len(chosen)
    longest, second, *_ = sorted(sizes, reverse=True)
    assert longest * second <= len(chosen) <= longest * second * 1.4


def test_of_three_axes_the_longest_two_decide_how_many() -> None:
    assert len(pairwise("abcde", "xyz", [False, True])) == 15


def test_it_is_the_same_each_time() -> None:
    axes = "abcd", [None, 1, 2], [True, False], "pqr"
    assert pairwise(*axes) == pairwise(*axes)


def test_two_axes_are_all_combinations() -> None:
    assert pairwise("ab", [1, 2, 3]) == list(product("ab", [1, 2, 3]))
