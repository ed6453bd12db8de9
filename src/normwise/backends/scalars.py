"""Arguments that are numbers or flags: what passes for one, and what is said of anything else."""

from __future__ import annotations

import contextlib
import numbers
from typing import Any

import torch
from torch import Tensor

from normwise.words import given


def is_number(value: Any, *, tensors: bool = True) -> bool:
    """Whether this is one real number: Python's, NumPy's, a symbolic one, or a tensor of one. True and False are none:
    they stand where a number is expected when arguments are given by place and one is left out."""
    if isinstance(value, float):
        return True
    if isinstance(value, Tensor):
        return tensors and value.numel() == 1 and not value.is_complex() and value.dtype != torch.bool
    if isinstance(value, bool):
        return False
    return isinstance(value, (int, torch.SymInt, torch.SymFloat, numbers.Real))


def number(name: str, value: Any, accepted: str, cure: str = "", *, tensors: bool = True) -> None:
    """TypeError unless `value` is a number; `accepted` says which are, as in "a positive number"."""
    if not is_number(value, tensors=tensors):
        raise TypeError(f"{name} must be {accepted}, but got {given(value)}: {cure or _meant(name, value)}")


def flags(**given_flags: Any) -> None:
    """TypeError for what is neither True nor False (1 and 0 will do): a word such as "false" would count as True."""
    for name, value in given_flags.items():
        if getattr(value, "ndim", 0) or value not in (0, 1):
            raise TypeError(f"{name} should be of type bool, got: {given(value)}: give True or False")


def _meant(name: str, value: Any) -> str:
    """What to write instead."""
    if isinstance(value, bool):
        return "if it is meant for another argument, give that one by its name"
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return f"write {name}={float(value):g}"
    return "give a number"
